#include "../kernels.h"

int qlora::interface_version() { return kInterfaceVersion; }
