// The CUDA driver of a device whose memory is the host's and whose kernels do nothing, unless a hook
// runs them. Everything is done when it is asked for, in that order: streams and events order
// nothing. A function that stands here answers truly for such a device; one that is not written
// ends the process with its name (generated.cpp, from the headers).
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

static int setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}
static const int CAPABILITY = setting("SOFTWARE_GPU_CAPABILITY", 90);
static const size_t MEMORY = (size_t)setting("SOFTWARE_GPU_MEMORY_GB", 80) << 30;

// Never destroyed: torch frees memory and streams while the process ends, in no order.
static std::mutex &mutex = *new std::mutex;
typedef std::lock_guard<std::mutex> Guard;

void software_gpu_unwritten(const char *name) {
  fprintf(stderr, "software GPU: %s is not written in perf/software_gpu\n", name);
  abort();
}

// --- the log --------------------------------------------------------------------------------------

static std::atomic<bool> logging{false};
static auto &entries = *new std::vector<std::pair<Kind, std::string>>;

void software_gpu_note(Kind kind, const char *name) {
  if (!logging) return;
  Guard guard(mutex);
  entries.emplace_back(kind, name);
}
EXPORT void software_gpu_log(int on) {
  Guard guard(mutex);
  if (on) entries.clear();
  logging = on;
}
EXPORT long software_gpu_logged() {
  Guard guard(mutex);
  return entries.size();
}
EXPORT const char *software_gpu_entry(long number, int *kind) { // only while nothing is logged
  *kind = entries[number].first;
  return entries[number].second.c_str();
}

// --- memory ---------------------------------------------------------------------------------------

struct Block {
  size_t bytes;
  Place place;
};
static auto &blocks = *new std::map<char *, Block>;

size_t software_gpu_memory() { return MEMORY; }
void *software_gpu_allocate(size_t bytes, bool on_device) {
  if (bytes == 0) return nullptr;
  if (bytes > MEMORY) return nullptr;
  // Pages are the system's to give when they are touched: what no kernel touches takes no memory.
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (block == MAP_FAILED) return nullptr;
  Guard guard(mutex);
  blocks[(char *)block] = {bytes, on_device ? DEVICE : HOST};
  return block;
}
bool software_gpu_release(void *block) {
  if (block == nullptr) return true;
  Guard guard(mutex);
  auto found = blocks.find((char *)block);
  if (found == blocks.end()) return false;
  munmap(block, found->second.bytes);
  blocks.erase(found);
  return true;
}
Place software_gpu_find(const void *pointer, void **block, size_t *bytes) {
  Guard guard(mutex);
  auto next = blocks.upper_bound((char *)pointer);
  if (next == blocks.begin()) return UNKNOWN;
  auto &[start, found] = *--next;
  if ((char *)pointer >= start + found.bytes) return UNKNOWN;
  *block = start;
  *bytes = found.bytes;
  return found.place;
}

// --- capture --------------------------------------------------------------------------------------

static auto &captures = *new std::map<const void *, unsigned long long>; // by stream
static std::atomic<unsigned long long> last_capture{0};

unsigned long long software_gpu_capture_of(const void *stream) {
  if (!last_capture) return 0;
  Guard guard(mutex);
  auto found = captures.find(stream);
  return found == captures.end() ? 0 : found->second;
}
unsigned long long software_gpu_begin_capture(const void *stream) {
  Guard guard(mutex);
  return captures[stream] = ++last_capture;
}
unsigned long long software_gpu_end_capture(const void *stream) {
  Guard guard(mutex);
  unsigned long long ended = captures[stream];
  for (auto it = captures.begin(); it != captures.end();) {
    it = it->second == ended ? captures.erase(it) : std::next(it);
  }
  return ended;
}
void software_gpu_join_capture(const void *stream, unsigned long long capture) {
  Guard guard(mutex);
  captures[stream] = capture;
}

// --- hooks ----------------------------------------------------------------------------------------

static std::atomic<LaunchHook> launch_hook{nullptr};
static std::atomic<ReplayHook> replay_hook{nullptr};
void software_gpu_on_launch(LaunchHook hook) { launch_hook = hook; }
void software_gpu_on_replay(ReplayHook hook) { replay_hook = hook; }
int software_gpu_replay(unsigned long long capture) {
  ReplayHook hook = replay_hook;
  return hook ? hook(capture) : 0;
}

// --- the device -----------------------------------------------------------------------------------

const char *software_gpu_name() { return "software GPU"; }

// Sizes are those of an H100, by which torch, Triton and this package choose theirs.
int software_gpu_attribute(int attribute) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 232448;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
  case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
  case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
  case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
  case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
  case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
  case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
  case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return CAPABILITY / 10;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return CAPABILITY % 10;
  case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
  case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
  case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
  case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
  case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED:
  case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED:
  case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS: return 0;
  default:
    char name[64];
    snprintf(name, sizeof name, "device attribute %d", attribute);
    software_gpu_unwritten(name);
  }
}

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 0;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
  *value = software_gpu_attribute(attribute);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice) {
  snprintf(name, size, "%s", software_gpu_name());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult, const char **text) {
  *text = "a call that failed on the software GPU";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult, const char **text) {
  *text = "an error of the software GPU";
  return CUDA_SUCCESS;
}
#if CUDA_VERSION >= 12090
// Nothing is ever written to the driver's log.
EXPORT CUresult cuLogsRegisterCallback(CUlogsCallback, void *, CUlogsCallbackHandle *handle) {
  if (handle) *handle = nullptr;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }
#endif
// CUPTI asks for tables that no header describes: no profile is taken.
EXPORT CUresult cuGetExportTable(const void **, const CUuuid *) { return CUDA_ERROR_NOT_SUPPORTED; }

// --- the one context ------------------------------------------------------------------------------

static const CUcontext CONTEXT = (CUcontext)0x10;
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = CONTEXT;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
  return cuCtxGetCurrent(context);
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

// --- modules and functions ------------------------------------------------------------------------

struct Function {
  std::string name;
};
static const CUmodule MODULE = (CUmodule)0x20;
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *) {
  *module = MODULE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *, unsigned, CUjit_option *,
                                   void **) {
  *module = MODULE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *) {
  *module = MODULE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
  *function = (CUfunction) new Function{name}; // kept: a module is never really unloaded
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction) {
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 32; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction, int threads,
                                                            size_t) {
  *blocks = 2048 / threads;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                               unsigned grid_z, unsigned block_x, unsigned block_y,
                               unsigned block_z, unsigned shared, CUstream stream,
                               void **parameters, void **) {
  const char *name = ((Function *)function)->name.c_str();
  software_gpu_note(KERNEL, name);
  LaunchHook hook = launch_hook;
  if (!hook) return CUDA_SUCCESS;
  Launch launch = {name,   (unsigned long long)function,       {grid_x, grid_y, grid_z},
                   {block_x, block_y, block_z},  shared, stream, parameters,
                   software_gpu_capture_of(stream)};
  return (CUresult)hook(&launch);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters,
                                 void **extra) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
                        c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream, parameters,
                        extra);
}

// --- what Triton and torch ask the driver for besides ----------------------------------------------

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = software_gpu_capture_of(stream) ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                            : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                                      CUdeviceptr pointer) {
  void *block;
  size_t bytes;
  Place place = software_gpu_find((void *)pointer, &block, &bytes);
  if (place == UNKNOWN) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
  case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = pointer; break;
  case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    *(unsigned *)value = place == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    break;
  case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = 0; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
  void *block;
  size_t bytes;
  if (software_gpu_find((void *)pointer, &block, &bytes) == UNKNOWN) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = (CUdeviceptr)block;
  if (size) *size = bytes;
  return CUDA_SUCCESS;
}
