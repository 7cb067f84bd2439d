#define MASKSERVE_ISA avx2
#define MASKSERVE_ISA_NAME "avx2"
#include "kernels.hpp"
