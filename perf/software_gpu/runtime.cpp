// The CUDA runtime of the device in driver.cpp, for a torch that was built for CUDA: its kernels do
// nothing, its copies are done at once. What is not written here ends the process with its name.
#include "device.h"
#include <cuda_runtime_api.h>

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <mutex>
#include <unordered_map>
#include <vector>

static thread_local cudaError_t last_error = cudaSuccess;
static cudaError_t fail(cudaError_t error) { return last_error = error; }

// Nothing to do: everything is done by then, there is one device, and nothing has to be set up.
#define NOTHING_TO_DO(name, ...)                                                                   \
  EXPORT cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
NOTHING_TO_DO(cudaEventQuery, cudaEvent_t)
NOTHING_TO_DO(cudaStreamQuery, cudaStream_t)
NOTHING_TO_DO(cudaStreamDestroy, cudaStream_t)
NOTHING_TO_DO(cudaFuncSetAttribute, const void *, cudaFuncAttribute, int)
NOTHING_TO_DO(cudaProfilerStart)
NOTHING_TO_DO(cudaProfilerStop)
NOTHING_TO_DO(cudaGraphDestroy, cudaGraph_t)
NOTHING_TO_DO(cudaGraphExecDestroy, cudaGraphExec_t)
NOTHING_TO_DO(cudaGraphRetainUserObject, cudaGraph_t, cudaUserObject_t, unsigned, unsigned)
NOTHING_TO_DO(cudaUserObjectRelease, cudaUserObject_t, unsigned)
NOTHING_TO_DO(cudaHostRegister, void *, size_t, unsigned)
NOTHING_TO_DO(cudaHostUnregister, void *)

EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "an error of the software GPU";
}
EXPORT const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
  case cudaSuccess: return "no error";
  case cudaErrorMemoryAllocation: return "out of memory";
  case cudaErrorInvalidValue: return "invalid argument";
  case cudaErrorInvalidDevice: return "invalid device ordinal";
  case cudaErrorLaunchFailure: return "unspecified launch failure";
  case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  case cudaErrorStreamCaptureIsolation:
    return "dependency created on uncaptured work in another stream";
  default: return "a call that failed on the software GPU";
  }
}

// --- kernels that nvcc compiled: torch's ----------------------------------------------------------

static std::mutex &mutex = *new std::mutex;
static auto &names = *new std::unordered_map<const void *, const char *>; // by the host's function

EXPORT void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **) {}
EXPORT void __cudaUnregisterFatBinary(void **) {}
EXPORT char __cudaInitModule(void **) { return 1; }
EXPORT void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int,
                                   uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  std::lock_guard<std::mutex> guard(mutex);
  names[function] = name;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void *stream;
};
static thread_local std::vector<Configuration> configurations;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            struct CUstream_st *stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared,
                                              void *stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *(void **)stream = last.stream;
  return cudaSuccess;
}

static cudaError_t launch(const void *function) {
  auto found = names.find(function); // all are registered while torch is loaded
  software_gpu_note(KERNEL, found == names.end() ? "a kernel without a name" : found->second);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t,
                                    cudaStream_t) {
  return launch(function);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3, dim3, void **, size_t,
                                               cudaStream_t) {
  return launch(function);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *function, void **) {
  return launch(function);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t,
                                      cudaStream_t) {
  return launch(kernel);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion =
      10 * software_gpu_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
      software_gpu_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *,
                                                                          int threads, size_t,
                                                                          unsigned) {
  *blocks = 2048 / threads;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function,
                                                                 int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}

// --- the device -----------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int device) {
  return device ? fail(cudaErrorInvalidDevice) : cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = software_gpu_attribute(attribute); // the runtime numbers them as the driver does
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  auto is = software_gpu_attribute;
  memset(p, 0, sizeof *p);
  strcpy(p->name, software_gpu_name());
  p->totalGlobalMem = software_gpu_memory();
  p->sharedMemPerBlock = is(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
  p->regsPerBlock = is(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK);
  p->warpSize = is(CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = is(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  for (int i = 0; i < 3; i++) {
    p->maxThreadsDim[i] = is(CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i);
    p->maxGridSize[i] = is(CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i);
  }
  p->totalConstMem = is(CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY);
  p->major = is(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  p->minor = is(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  p->textureAlignment = is(CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT);
  p->multiProcessorCount = is(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
  p->memoryBusWidth = is(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  p->l2CacheSize = is(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  p->maxThreadsPerMultiProcessor = is(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->maxBlocksPerMultiProcessor = is(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  p->sharedMemPerMultiprocessor = is(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
  p->sharedMemPerBlockOptin = is(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  p->regsPerMultiprocessor = is(CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
  *can = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int) {
  snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}
// A function of the driver, also where it is called by its name without the version.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult *result) {
  char versioned[200];
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  *function = dlsym(RTLD_DEFAULT, versioned);
  if (!*function) *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// --- memory ---------------------------------------------------------------------------------------

static cudaError_t allocate(void **block, size_t bytes, bool on_device) {
  *block = software_gpu_allocate(bytes, on_device);
  return *block || !bytes ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
static cudaError_t release(void *block) {
  return software_gpu_release(block) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
EXPORT cudaError_t cudaMalloc(void **block, size_t bytes) { return allocate(block, bytes, true); }
EXPORT cudaError_t cudaFree(void *block) { return release(block); }
EXPORT cudaError_t cudaHostAlloc(void **block, size_t bytes, unsigned) {
  return allocate(block, bytes, false);
}
EXPORT cudaError_t cudaFreeHost(void *block) { return release(block); }
EXPORT cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *total = software_gpu_memory();
  *free = *total - ((size_t)1 << 30);
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes,
                                            const void *pointer) {
  void *block;
  size_t bytes;
  Place place = software_gpu_find(pointer, &block, &bytes);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = place == DEVICE ? cudaMemoryTypeDevice
                     : place == HOST ? cudaMemoryTypeHost
                                     : cudaMemoryTypeUnregistered;
  attributes->devicePointer = place == UNKNOWN ? nullptr : (void *)pointer;
  attributes->hostPointer = place == DEVICE ? nullptr : (void *)pointer;
  return cudaSuccess;
}

static const char *direction(void *to, const void *from) {
  void *block;
  size_t bytes;
  bool to_device = software_gpu_find(to, &block, &bytes) == DEVICE;
  bool from_device = software_gpu_find(from, &block, &bytes) == DEVICE;
  return to_device ? from_device ? "device to device" : "host to device"
                   : from_device ? "device to host" : "host to host";
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  software_gpu_note(COPY, direction(to, from));
  memmove(to, from, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  software_gpu_note(SYNCHRONISATION, "cudaMemcpy");
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  software_gpu_note(COPY, direction(to, from));
  for (size_t row = 0; row < height; row++) {
    memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
  software_gpu_note(MEMSET, "");
  memset(to, value, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

// --- streams and events ---------------------------------------------------------------------------

struct Event {
  double seconds;             // of the host's clock, all that it times; 0: never recorded
  unsigned long long capture; // that it was recorded in
};

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  static std::atomic<size_t> last{0x1000};
  *stream = (cudaStream_t)(last += 16);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
  *priority = 0;
  return cudaSuccess;
}

// The host waits, which no stream that records a graph allows.
static cudaError_t synchronise(const char *name, bool capturing) {
  software_gpu_note(SYNCHRONISATION, name);
  return capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return synchronise("cudaStreamSynchronize", software_gpu_capture_of(stream) != 0);
}
EXPORT cudaError_t cudaDeviceSynchronize() { return synchronise("cudaDeviceSynchronize", false); }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return synchronise("cudaEventSynchronize", ((Event *)event)->capture != 0);
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = (cudaEvent_t) new Event{0, 0};
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event *)event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  software_gpu_note(EVENT, "recorded");
  *(Event *)event = {now.tv_sec + 1e-9 * now.tv_nsec, software_gpu_capture_of(stream)};
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1e3 * (((Event *)end)->seconds - ((Event *)start)->seconds);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  software_gpu_note(EVENT, "waited for");
  auto [seconds, capture] = *(Event *)event;
  if (capture) {
    software_gpu_join_capture(stream, capture);
  } else if (seconds && software_gpu_capture_of(stream)) {
    return fail(cudaErrorStreamCaptureIsolation); // on work that is in no graph
  }
  return cudaSuccess;
}

// --- graphs: known by the number of their capture -------------------------------------------------

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  software_gpu_begin_capture(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t,
                                                 const cudaGraphNode_t *, const cudaGraphEdgeData *,
                                                 size_t, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = (cudaGraph_t)software_gpu_end_capture(stream);
  return cudaSuccess;
}
static cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
  return software_gpu_capture_of(stream) ? cudaStreamCaptureStatusActive
                                         : cudaStreamCaptureStatusNone;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  *status = capture_status(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies,
                                            const cudaGraphEdgeData **edges, size_t *number) {
  unsigned long long capture = software_gpu_capture_of(stream);
  *status = capture_status(stream);
  if (id) *id = capture;
  if (graph) *graph = (cudaGraph_t)capture;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                                 unsigned long long) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t *, size_t *number) {
  *number = 1; // torch warns of a graph without any
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  software_gpu_note(GRAPH, "");
  int failed = software_gpu_replay((unsigned long long)executable);
  return failed ? fail(cudaErrorLaunchFailure) : cudaSuccess;
}
// What a graph would own and destroy; graphs here own nothing, and torch frees the rest itself.
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *, cudaHostFn_t, unsigned,
                                        unsigned) {
  *object = (cudaUserObject_t)0x30;
  return cudaSuccess;
}
