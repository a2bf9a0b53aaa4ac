/* The memory of the device as the emulated board has it. */
#ifndef NC_MEMORY_MAP_H
#define NC_MEMORY_MAP_H
#include <stdint.h>

typedef struct {
    uint32_t base, log2_bytes, access; /* 0 none, 3 reading and writing, 6 reading and running */
} nc_region_t;

/* Ends with a region of no bytes, if there are fewer than eight. */
extern const nc_region_t guard_regions[8];
#endif
