#define MASKSERVE_ISA avx512
#define MASKSERVE_ISA_NAME "avx512"
#include "kernels.hpp"
