"""Integer networks for microcontrollers: the program, its kernels, where every byte lies, and the C project that runs it."""
