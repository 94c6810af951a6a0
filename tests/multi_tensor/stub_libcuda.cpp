// A libcuda.so.1 that runs nothing: it records what is launched, and does copies at once.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

constexpr int MOST_ARGUMENTS = 288, MOST_RECORDS = 1024, ERROR_LAUNCH_FAILED = 719, NOT_READY = 600;

struct Record {
  int64_t kind;  // 0: a launch, 1: a copy
  uint64_t function, stream, programs, threads, shared, context;
  uint64_t bytes, place, from;
  int64_t count;
  uint64_t arguments[MOST_ARGUMENTS];
};

struct Kernel {
  int64_t count;
  int64_t sizes[MOST_ARGUMENTS];
};

struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};

static Record records[MOST_RECORDS];
static int64_t recorded, calls, fails_at = -1, pinned, events, pops;
static int capturing, busy, mode;
static void* current = (void*)0xC0;

static int note(const Record& record) {
  if (calls++ == fails_at) return ERROR_LAUNCH_FAILED;
  if (recorded < MOST_RECORDS) records[recorded] = record;
  ++recorded;
  return 0;
}

static int launch(void* function, unsigned programs, unsigned threads, unsigned shared,
                  void* stream, void** arguments) {
  Record record = {};
  record.function = (uint64_t)function, record.stream = (uint64_t)stream;
  record.programs = programs, record.threads = threads, record.shared = shared;
  record.context = (uint64_t)current;
  const Kernel& kernel = *(Kernel*)function;
  record.count = kernel.count;
  for (int64_t i = 0; i < kernel.count; ++i)
    memcpy(&record.arguments[i], arguments[i], kernel.sizes[i]);
  return note(record);
}

extern "C" {
// For tests.
void* stub_kernel(int64_t count, const int64_t* sizes) {
  Kernel* const kernel = (Kernel*)calloc(1, sizeof(Kernel));
  kernel->count = count;
  memcpy(kernel->sizes, sizes, count * sizeof(int64_t));
  return kernel;
}
int64_t stub_records(Record** first) {
  *first = records;
  return recorded < MOST_RECORDS ? recorded : MOST_RECORDS;
}
void stub_reset() { recorded = calls = 0, fails_at = -1, capturing = busy = 0; }
void stub_fail_at(int64_t call) { fails_at = calls + call; }
void stub_set(int is_capturing, int is_busy) { capturing = is_capturing, busy = is_busy; }
void stub_set_context(void* context) { current = context; }
int64_t stub_count(int what) { return what == 0 ? pinned : what == 1 ? events : pops; }

// The driver.
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned shared, void* stream, void** arguments, void**) {
  return launch(function, x * y * z, threads, shared, stream, arguments);
}
int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void**) {
  return launch(function, config->grid[0] * config->grid[1] * config->grid[2], config->block[0],
                config->shared, config->stream, arguments);
}
int cuMemcpyHtoDAsync_v2(uint64_t place, const void* from, size_t bytes, void* stream) {
  Record record = {};
  record.kind = 1, record.place = place, record.from = (uint64_t)from, record.bytes = bytes;
  record.stream = (uint64_t)stream, record.context = (uint64_t)current;
  memcpy((void*)place, from, bytes);
  record.count = bytes / 8 < MOST_ARGUMENTS ? bytes / 8 : MOST_ARGUMENTS;
  memcpy(record.arguments, from, record.count * 8);
  return note(record);
}
int cuStreamIsCapturing(void*, int* status) { return *status = capturing, 0; }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxSetCurrent(void* context) { return current = context, 0; }
static void* below;
int cuCtxPushCurrent_v2(void* context) { return below = current, current = context, 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = current, current = below, ++pops, 0; }
int cuEventCreate(void** event, unsigned) { return *event = malloc(1), ++events, 0; }
int cuEventRecord(void*, void*) { return 0; }
int cuEventQuery(void*) { return busy ? NOT_READY : 0; }
int cuMemHostAlloc(void** host, size_t bytes, unsigned) {
  if (capturing && mode != 2) return ERROR_LAUNCH_FAILED;
  return *host = malloc(bytes), ++pinned, 0;
}
int cuThreadExchangeStreamCaptureMode(int* given) {
  const int before = mode;
  return mode = *given, *given = before, 0;
}
int cuGetErrorString(int, const char** text) { return *text = "a stub's error", 0; }

// What else Triton's launcher asks for.
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)0xC0, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 1 << 20, 0; }
int cuPointerGetAttribute(uint64_t* out, int, uint64_t pointer) { return *out = pointer, 0; }
int cuPointerGetAttributes(unsigned, int*, void** out, uint64_t pointer) {
  return *(uint64_t*)out[0] = pointer, 0;
}
int cuModuleLoadData(void**, const void*) { return 1; }
int cuModuleGetFunction(void**, void*, const char*) { return 1; }
int cuFuncGetAttribute(int*, int, void*) { return 1; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuOccupancyMaxActiveClusters(int*, void*, void*) { return 1; }
int cuCtxGetLimit(size_t*, int) { return 1; }
int cuCtxSetLimit(int, size_t) { return 1; }
int cuTensorMapEncodeTiled() { return 1; }
int cuTensorMapEncodeIm2col() { return 1; }
}
