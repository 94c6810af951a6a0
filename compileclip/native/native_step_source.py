"""The C++ of ``native_step.py``: one call that checks, gathers, copies, launches and counts.

``native_step.py`` lays out the structs. The code follows that of ``native_tensors_source.py`` and
``cuda_driver_source.py`` in one library: it looks up tensors by the one, copies by the other.
"""

from __future__ import annotations

SOURCE = r"""
struct Launch {
  void* function;
  int64_t programs, threads, shared;
  void** arguments;  // where each is
};

// The gradients' addresses of a bucket.
struct Moved {
  const uint64_t* now;
  uint64_t* there;  // what the device has
  uint64_t place;   // where it has them
  int64_t n;
};

// A tensor of numbers in the state, one for each parameter.
struct Count {
  Object tensor;
  int64_t version;  // that nobody else has written since
  char* data;       // if the host is to write "value" there, where "before" is to be
  int64_t n, is_double;
  const double *value, *before;
};

struct Norm {
  int (*run)(void*, int, int64_t, const uint64_t*, const int64_t*, const int64_t*, const void*, int,
             int, int);
  int64_t out_dtype, n;
  const uint64_t* pointers;
  const int64_t *sizes, *first_chunk;
  int64_t dtype, max;
};

struct Update {
  void (*run)(const uint64_t*, int64_t, const int64_t*, const int64_t*, const double*,
              const uint64_t*, int);
  const uint64_t* table;
  int64_t n;
  const int64_t *sizes, *first_chunk;
  const double* scalars;
  uint64_t* values;
  int64_t norm;  // which of the values is the norm's address, or -1
};

// Lets other threads of Python run, which may let go of gradients meanwhile; so these are held.
struct Others {
  int64_t run;  // whether they are to
  void* (*save_thread)();
  void (*restore_thread)(void*);
  int32_t (*hold)(Tensor, Tensor*);
  int32_t (*let_go)(Tensor);
};

template <class T>
struct Array {
  int64_t n;
  T* items;
  T* begin() const { return items; }
  T* end() const { return items + n; }
};

struct Steady {
  const Optimizer* before;
  Array<const Bucket* const> buckets;
  Array<const Count> counts;
  Array<const Moved> moved;
  uint64_t* given;  // takes the addresses of the norm, a GradScaler's factor and its verdict
  int64_t writes_grads, copies_always;
  const Driver* driver;  // on a GPU, else null
  Array<const Launch> launches;
  const Norm* norm;  // from here on: on a CPU
  Array<const Update> updates;
  int64_t only_finite;
  Others others;
};

enum Outcome { DONE, OTHERWISE };  // else an error of the driver's, negated

constexpr int64_t LEAST = 512;  // parameters worth another thread

static bool may_run() {
  const char* const set = getenv("COMPILECLIP_DISABLE");
  return !set || strcmp(set, "1");
}

// Whether a count is where it was and what it was. A version does not tell: a tensor that was
// copied or loaded may have one of its own, and what writes through ".data" or NumPy counts none.
static bool is_counted(const Torch& torch, const Count& count) {
  const Tensor tensor = torch.tensor(count.tensor);
  const char* const version = torch.version_of(*tensor);
  if (!version || *(uint32_t*)(version + torch.number) != uint32_t(count.version)) return false;
  if (!count.data) return true;
  uint64_t address;
  if (torch.data_ptr(tensor, &address) || address != uint64_t(count.data)) return false;
  for (int64_t i = 0; i < count.n; ++i) {
    const double found = count.is_double ? ((double*)count.data)[i] : ((float*)count.data)[i];
    if (found != *count.before) return false;
  }
  return true;
}

static bool is_as_before(const Torch& torch, const Steady& steady, Object groups, Object state,
                         int threads) {
  for (const Count& count : steady.counts)
    if (!is_counted(torch, count)) return false;
  if (!compileclip_same(&torch, steady.before, groups, state)) return false;
  for (const Bucket* bucket : steady.buckets) {
    const int64_t most = 1 + bucket->n / LEAST;
    if (compileclip_gather(&torch, bucket, most < threads ? int(most) : threads) != SAME)
      return false;
  }
  return true;
}

static bool have_moved(const Steady& steady) {
  for (const Moved& each : steady.moved)
    if (memcmp(each.now, each.there, each.n * sizeof(uint64_t))) return true;
  return false;
}

static int copy_moved(const Steady& steady, const Moved& each, void* stream) {
  int64_t first = 0, end = each.n;
  if (!steady.copies_always) {
    while (first < end && each.now[first] == each.there[first]) ++first;
    while (end > first && each.now[end - 1] == each.there[end - 1]) --end;
  }
  if (first == end) return 0;
  const int64_t bytes = (end - first) * sizeof(uint64_t);
  const int status =
      copy(*steady.driver, each.place + first * sizeof(uint64_t), each.now + first, bytes, stream);
  if (!status) memcpy(each.there + first, each.now + first, bytes);
  return status;
}

static int on_device(const Steady& steady, void* stream) {
  const Driver& driver = *steady.driver;
  int capturing = 0, status;
  if (driver.capture_status(stream, &capturing) || capturing) return OTHERWISE;
  const Within within(driver);
  if (within.status) return OTHERWISE;
  for (const Moved& each : steady.moved)
    if ((status = copy_moved(steady, each, stream))) return -status;
  for (const Launch& each : steady.launches)
    if ((status = driver.launch(each.function, unsigned(each.programs), 1, 1,
                                unsigned(each.threads), 1, 1, unsigned(each.shared), stream,
                                each.arguments, nullptr)))
      return -status;
  return DONE;
}

static bool is_finite(const Norm& norm, const void* total) {
  return norm.out_dtype ? isfinite(*(const double*)total) : isfinite(*(const float*)total);
}

struct Held {
  const Others& others;
  Tensor* tensors = nullptr;
  int64_t n = 0;

  explicit Held(const Others& given) : others(given) {}
  bool hold(const Torch& torch, const Steady& steady) {
    int64_t all = 0;
    for (const Bucket* bucket : steady.buckets) all += bucket->n;
    tensors = (Tensor*)malloc(all * sizeof(Tensor));
    if (!tensors) return false;
    for (const Bucket* bucket : steady.buckets)
      for (int64_t i = 0; i < bucket->n; ++i)
        if (others.hold(torch.grad_of(bucket->params[i]), &tensors[n++])) return --n, false;
    return true;
  }
  ~Held() {
    while (n > 0) others.let_go(tensors[--n]);
    free(tensors);
  }
};

static int on_host(const Torch& torch, const Steady& steady, int threads) {
  const Norm& norm = *steady.norm;
  const Others& others = steady.others;
  void* const total = (void*)steady.given[0];
  Held held(others);
  if (others.run && !held.hold(torch, steady)) return OTHERWISE;
  void* const thread = others.run ? others.save_thread() : nullptr;
  int status = norm.run(total, int(norm.out_dtype), norm.n, norm.pointers, norm.sizes,
                        norm.first_chunk, nullptr, int(norm.dtype), int(norm.max), threads);
  if (!status && steady.only_finite) status = !is_finite(norm, total);
  if (!status)
    for (const Update& each : steady.updates) {
      if (each.norm >= 0) each.values[each.norm] = steady.given[0];
      each.run(each.table, each.n, each.sizes, each.first_chunk, each.scalars, each.values,
               threads);
    }
  if (others.run) others.restore_thread(thread);
  return status ? OTHERWISE : DONE;
}

static void write(const Count& count) {
  if (!count.data) return;
  const double value = *count.value;
  if (count.is_double)
    for (int64_t i = 0; i < count.n; ++i) ((double*)count.data)[i] = value;
  else
    for (int64_t i = 0; i < count.n; ++i) ((float*)count.data)[i] = float(value);
}

// Step, if all is as it was in the last step. "norm", "scale" and "verdict" are tensors.
extern "C" int compileclip_step(const Torch* torch, const Steady* steady, Object groups,
                                Object state, Object norm, Object scale, Object verdict,
                                void* stream, int threads) {
  if (!may_run() || (steady->driver && steady->driver->pid != getpid())) return OTHERWISE;
  const Object given[] = {norm, scale, verdict};
  for (int k = 0; k < 3; ++k)
    if (torch->data_ptr(torch->tensor(given[k]), &steady->given[k])) return OTHERWISE;
  if (!is_as_before(*torch, *steady, groups, state, threads)) return OTHERWISE;
  if (steady->writes_grads && have_moved(*steady)) return OTHERWISE;
  const int outcome =
      steady->driver ? on_device(*steady, stream) : on_host(*torch, *steady, threads);
  if (outcome != DONE) return outcome;
  for (const Bucket* bucket : steady->buckets)
    compileclip_note_written(torch, bucket, int(steady->writes_grads));
  for (const Count& count : steady->counts) write(count);
  return DONE;
}
"""
