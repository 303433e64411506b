"""bitsandbytes.cextension: what programs ask of its compiled library. Ours is native.py."""

HIP_ENVIRONMENT = False
ROCM_WARP_SIZE_64 = False
BNB_BACKEND = "CUDA"
