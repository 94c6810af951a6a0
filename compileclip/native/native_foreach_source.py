"""The C++ of ``native_foreach.py``: gather a list of tensors, copy that to the device, launch."""

from __future__ import annotations

SOURCE = r"""
struct Kernel {
  void* function;  // or null: it is not launched
  int64_t threads, shared, scratch;
};

// Tensors of one dtype and device without gaps.
struct List {
  const Driver* driver;
  Plain plain;
  uint64_t types[2];  // of Python's objects
  int64_t chunk;      // elements
  int64_t from_grads, writes;
  uint64_t* addresses;
  int64_t* sizes;
  int64_t n, chunks;  // found
};

static bool is_contiguous(const Torch& torch, const void* held, int64_t* count) {
  const int64_t dim = int64_t(word(held, torch.shape));
  if (dim > INLINE) return false;
  const int64_t* const sizes = (const int64_t*)((const char*)held + torch.shape) + 1;
  int64_t elements = 1;
  for (int64_t d = dim; d-- > 0; elements *= sizes[d])
    if (sizes[d] != 1 && sizes[INLINE + d] != elements) return false;
  *count = elements;
  return true;
}

static uint64_t type_of(Object object) { return word(object, sizeof(void*)); }

// The types of what parameters and state may be.
struct Types {
  uint64_t tensors[2], others[3], dictionary;
};

static bool is_contiguous(const Torch& torch, const Types& known, uint64_t keys, Object object) {
  const uint64_t type = type_of(object);
  for (const uint64_t other : known.others)
    if (type == other) return true;
  int64_t count;
  return (type == known.tensors[0] || type == known.tensors[1]) &&
         word(*torch.tensor(object), torch.keys) == keys &&
         is_contiguous(torch, *torch.tensor(object), &count);
}

// Whether the parameters of a list, their gradients and all state are known to be contiguous.
extern "C" int compileclip_contiguous(const Torch* torch, const Types* known, Object params,
                                      int64_t n, Object state) {
  if (!torch->shape || !n) return 0;
  const Object first = torch->get_entry(params, 0);
  if (type_of(first) != known->tensors[0] && type_of(first) != known->tensors[1]) return 0;
  const uint64_t keys = word(*torch->tensor(first), torch->keys);
  int64_t count;
  for (int64_t i = 0; i < n; ++i) {
    const Object param = torch->get_entry(params, i);
    if (!is_contiguous(*torch, *known, keys, param)) return 0;
    const void* const grad = *torch->grad_of(param);
    if (grad == torch->undefined) continue;
    if (word(grad, torch->keys) != keys || !is_contiguous(*torch, grad, &count)) return 0;
  }
  Object key, held, name, value;
  for (int64_t at = 0; torch->next(state, &at, &key, &held);) {
    if (type_of(held) != known->dictionary) return 0;
    for (int64_t within = 0; torch->next(held, &within, &name, &value);)
      if (!is_contiguous(*torch, *known, keys, value)) return 0;
  }
  return 1;
}

static int compare_words(const void* a, const void* b) {
  const uint64_t x = *(const uint64_t*)a, y = *(const uint64_t*)b;
  return x < y ? -1 : x > y;
}

// Whether no two tensors share memory, so that it does not matter which is written first.
static bool are_apart(const List& list) {
  uint64_t* const spans = (uint64_t*)malloc((list.n + 1) * 2 * sizeof(uint64_t));
  if (!spans) return false;
  bool sorted = true;
  int64_t count = 0;
  for (int64_t i = 0; i < list.n; ++i) {
    if (!list.sizes[i]) continue;
    spans[2 * count] = list.addresses[i];
    spans[2 * count + 1] = list.addresses[i] + list.sizes[i] * list.plain.itemsize;
    sorted &= !count || spans[2 * count - 2] <= spans[2 * count];
    ++count;
  }
  if (!sorted) qsort(spans, count, 2 * sizeof(uint64_t), compare_words);
  bool apart = true;
  for (int64_t i = 1; i < count; ++i) apart &= spans[2 * i - 1] <= spans[2 * i];
  free(spans);
  return apart;
}

// Look up the tensors of a Python list, or their gradients where they have one; 0 if none is odd.
extern "C" int compileclip_list(const Torch* torch, List* list, Object objects, int64_t count) {
  if (!torch->shape || !torch->version || !may_run()) return OTHERWISE;
  if (list->driver->pid != getpid()) return OTHERWISE;
  list->n = list->chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Object object = torch->get_entry(objects, i);
    const uint64_t type = type_of(object);
    if (type != list->types[0] && type != list->types[1]) return OTHERWISE;
    Tensor tensor = torch->tensor(object);
    if (list->from_grads) tensor = torch->grad(*tensor);
    if (*tensor == torch->undefined) continue;
    uint64_t address;
    int64_t size;
    if (!find(*torch, *tensor, list->plain, &address)) return OTHERWISE;
    if (!is_contiguous(*torch, *tensor, &size) || (size && !address)) return OTHERWISE;
    list->addresses[list->n] = address, list->sizes[list->n++] = size;
    list->chunks += (size + list->chunk - 1) / list->chunk;
  }
  return list->writes && !are_apart(*list) ? OTHERWISE : DONE;
}

static int launch(const Driver& driver, const Kernel& kernel, int64_t programs, void** arguments,
                  void* stream) {
  return driver.launch(kernel.function, unsigned(programs), 1, 1, unsigned(kernel.threads), 1, 1,
                       unsigned(kernel.shared), stream, arguments, nullptr);
}

// Addresses, sizes and which chunk is whose, as kernels take them.
static int copy_list(const List& list, uint64_t place, void* stream) {
  const int64_t words = 2 * list.n + list.chunks, bytes = words * sizeof(uint64_t);
  uint64_t* const filled = (uint64_t*)malloc(bytes);
  if (!filled) return 2;
  memcpy(filled, list.addresses, list.n * sizeof(uint64_t));
  memcpy(filled + list.n, list.sizes, list.n * sizeof(uint64_t));
  uint64_t* block = filled + 2 * list.n;
  for (int64_t i = 0; i < list.n; ++i)
    for (int64_t k = 0; k * list.chunk < list.sizes[i]; ++k) *block++ = uint64_t(k) << 32 | i;
  const int status = copy(*list.driver, place, filled, bytes, stream);
  free(filled);
  return status;
}

// Take the norm, write the tensors, or both, on the current stream. "place" has room for the list
// and the norm's shares; "number" is the norm, or what kernels multiply by.
extern "C" int compileclip_launch_list(const Torch* torch, const List* list, Object objects,
                                       int64_t count, uint64_t place, uint64_t number,
                                       const Kernel* kernels, double bound, void* stream) {
  const Driver& driver = *list->driver;
  const Within within(driver);
  int status = within.status;
  if (!status) status = copy_list(*list, place, stream);
  if (status) return status;
  uint64_t sizes = place + list->n * sizeof(uint64_t), blocks = sizes + list->n * sizeof(uint64_t);
  uint64_t shares = blocks + list->chunks * sizeof(uint64_t), none = 0;
  int32_t done = 0, chunks = int32_t(list->chunks);
  void* take[] = {&place, &sizes, &blocks, &shares, &done, &chunks, &none, &none};
  void* add[] = {&shares, &number, &chunks, &none, &none};
  void* write[] = {&place, &sizes, &blocks, &number, &bound, &none, &none};
  if (kernels[0].function) status = launch(driver, kernels[0], list->chunks, take, stream);
  if (!status && kernels[1].function) status = launch(driver, kernels[1], 1, add, stream);
  if (!status && kernels[2].function)
    status = launch(driver, kernels[2], list->chunks, write, stream);
  if (status || !list->writes) return status;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor tensor = torch->tensor(torch->get_entry(objects, i));
    const Tensor written = list->from_grads ? torch->grad(*tensor) : tensor;
    if (*written != torch->undefined) note_written(*torch, *written);
  }
  return DONE;
}
"""
