"""Parts of mcu.py: kernels and their peer, three plans of one network, trained networks, and how programs are built and compared."""
