"""The C++ of ``native_tensors.py``: it looks tensors up and sees whether an optimizer has changed.

``Library`` there lays out ``Torch``; ``pointers.py`` lays out the other structs.
"""

from __future__ import annotations

SOURCE = r"""
#include <stdint.h>

typedef void* Object;  // of Python's
typedef void** Tensor;  // at::Tensor*, which is a handle in torch's C interface

struct Torch {
  int32_t (*data_ptr)(Tensor, uint64_t*);
  int32_t (*dim)(Tensor, int64_t*);
  int32_t (*sizes)(Tensor, int64_t**);
  int32_t (*strides)(Tensor, int64_t**);
  int32_t (*dtype)(Tensor, int32_t*);
  int32_t (*layout)(Tensor, int32_t*);
  int32_t (*device_type)(Tensor, int32_t*);
  int32_t (*device_index)(Tensor, int32_t*);
  Tensor (*grad)(void*);
  Object (*get_item)(Object dict, Object key);
  Object (*get_entry)(Object list, int64_t index);
  int64_t (*length)(Object list);
  int32_t (*next)(Object dict, int64_t* position, Object* key, Object* value);
  void* undefined;  // what the tensor holds that stands for none
  int64_t offset;   // of the tensor in its Python object
  int64_t storage;  // where in what a tensor holds its storage is; it may be a guess
  int64_t version;  // where in that its version counter is, or 0 if that is not known
  int64_t number;   // where in that counter the number is
  // Where in what a tensor holds the rest of a plain tensor is; or zeros if that is not known.
  int64_t shape, first, kind, keys;  // of the first element in the storage; dtype and device
  int64_t data, context;           // where in a storage its memory and what owns that are
  uint64_t kind_mask, odd;         // bits of "kind" that count; of "keys" that are not plain
  int64_t tag;  // where a dictionary has a number that no other state of it has had, or 0

  Tensor tensor(Object object) const { return (Tensor)((char*)object + offset); }
  Tensor grad_of(Object object) const { return grad(*tensor(object)); }
  void* storage_of(void* held) const { return *(void**)((char*)held + storage); }
  char* version_of(void* held) const { return *(char**)((char*)held + version); }
};

// What plain tensors of a dtype and device have in common.
struct Plain {
  uint64_t kind, keys;
  int64_t itemsize;
};

struct Bucket {
  int64_t n, names;
  const Object *params, *states, *keys, *kept;
  const int64_t* rows;  // of the names' tensors in the table; -1 for what is no operand
  uint64_t* table;
  int64_t grad_row;
  const int64_t* shapes;  // dim, sizes and strides of one parameter after the other
  const int64_t* starts;  // of each parameter in "shapes"
  const int32_t* kind;    // of gradients: dtype, layout, device_type, device_index
  const int64_t* places;  // of the gradients in "grads"
  uint64_t* grads;
  int64_t hints_each;
  const Object* hints;   // what is read of each parameter
  const int64_t* lines;  // of each hint, how many lines of the cache
  uint64_t* tags;        // of the states, as they were when they held what is kept
  const Plain* plain;    // parameters, gradients and what is kept; of 0-dim state, zeros
};

enum Status { SAME, LAYOUT, STALE };

// What a step touches is spread over memory and no longer in the cache when it begins. So it is
// fetched some parameters ahead; addresses that are no longer right cost nothing but that.
constexpr int64_t BLOCK = 128;  // parameters that a thread takes at a time
constexpr int64_t TENSOR = 3, STORAGE = 1, ENTRIES = 3;  // cache lines
constexpr int64_t TABLE = 4;  // where CPython has that of a dictionary, in pointers; a guess

static void prefetch(const void* object, int64_t lines) {
  for (int64_t k = 0; k < lines; ++k) __builtin_prefetch((const char*)object + 64 * k);
}

static void prefetch(const Torch& torch, const Bucket& bucket, int64_t now, int64_t end) {
  const int64_t count = bucket.hints_each;
  if (now + 6 < end)
    for (int64_t k = 0; k < count; ++k)
      prefetch(bucket.hints[(now + 6) * count + k], bucket.lines[k]);
  if (now + 4 < end) prefetch(*torch.grad_of(bucket.params[now + 4]), TENSOR);
  if (now + 2 < end) prefetch(torch.storage_of(*torch.grad_of(bucket.params[now + 2])), STORAGE);
}

static void prefetch_state(const Torch& torch, const Bucket& bucket, int64_t now) {
  if (now + 16 < bucket.n) prefetch(bucket.states[now + 16], 1);
  if (torch.tag) return;
  if (now + 8 < bucket.n) prefetch(((void**)bucket.states[now + 8])[TABLE], ENTRIES);
}

// Whether a tensor has the shape, and where it differs in nothing but its strides, LAYOUT.
static Status compare(const Torch& torch, Tensor tensor, const int64_t* shape) {
  int64_t dim, *sizes, *strides;
  if (torch.dim(tensor, &dim) || dim != shape[0]) return STALE;
  if (torch.sizes(tensor, &sizes) || torch.strides(tensor, &strides)) return STALE;
  Status status = SAME;
  bool empty = false, single = true, odd = false;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != shape[1 + d]) return STALE;
    const bool differs = strides[d] != shape[1 + dim + d];
    if (sizes[d] > 1 && differs) status = LAYOUT;
    empty |= sizes[d] == 0, single &= sizes[d] == 1, odd |= differs;
  }
  // One element of a complex tensor's, which autograd may give as it is, and to be negated.
  if (single && odd) return LAYOUT;
  return empty ? SAME : status;
}

static bool is_kind(const Torch& torch, Tensor tensor, const int32_t* kind) {
  int32_t found[4];
  if (torch.layout(tensor, &found[1]) || found[1] != kind[1]) return false;
  if (torch.dtype(tensor, &found[0]) || found[0] != kind[0]) return false;
  if (torch.device_type(tensor, &found[2]) || found[2] != kind[2]) return false;
  return !torch.device_index(tensor, &found[3]) && found[3] == kind[3];
}

static bool has_elements(const int64_t* shape) {
  for (int64_t d = 0; d < shape[0]; ++d)
    if (shape[1 + d] == 0) return false;
  return true;
}

constexpr int64_t INLINE = 5;  // dimensions that a tensor keeps within itself

static uint64_t word(const void* object, int64_t offset) {
  return *(const uint64_t*)((const char*)object + offset);
}

// The address of a plain tensor, read where it is kept: a tenth of the time that the C interface
// takes. False of any other tensor; memory that is not its owner's own may be copied on writing.
static bool find(const Torch& torch, const void* held, const Plain& plain, uint64_t* address) {
  if ((word(held, torch.kind) & torch.kind_mask) != plain.kind) return false;
  if (word(held, torch.keys) != plain.keys || !plain.keys) return false;
  const void* const storage = torch.storage_of((void*)held);
  const uint64_t data = word(storage, torch.data);
  *address = data + word(held, torch.first) * plain.itemsize;
  return data == word(storage, torch.context);
}

// Whether a tensor has shape and strides; false as well where that takes a closer look.
static bool is_shaped(const Torch& torch, const void* held, const int64_t* shape) {
  const int64_t dim = shape[0];
  if (dim > INLINE || word(held, torch.shape) != uint64_t(dim)) return false;
  const int64_t* const sizes = (const int64_t*)((const char*)held + torch.shape) + 1;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != shape[1 + d] || sizes[INLINE + d] != shape[1 + dim + d]) return false;
  return true;
}

// Whether a tensor is to be negated when it is read, or its class has operations of its own.
static bool is_odd(const Torch& torch, const void* held) {
  return word(held, torch.keys) & torch.odd;
}

static bool is_at(const Torch& torch, Object object, const Plain& plain, uint64_t expected) {
  uint64_t address;
  const Tensor tensor = torch.tensor(object);
  if (torch.shape) {
    if (find(torch, *tensor, plain, &address) && address == expected) return true;
    if ((word(*tensor, torch.kind) & torch.kind_mask) != plain.kind || is_odd(torch, *tensor))
      return false;
  }
  return !torch.data_ptr(tensor, &address) && address == expected;
}

// Whether a parameter or its state is where and as it was: it may have been resized or transposed.
static bool is_same(const Torch& torch, Object object, const Plain& plain, uint64_t expected,
                    const int64_t* shape) {
  if (!is_at(torch, object, plain, expected)) return false;
  const Tensor tensor = torch.tensor(object);
  if (torch.shape && is_shaped(torch, *tensor, shape)) return true;
  return compare(torch, tensor, shape) == SAME;
}

static Status find_grad(const Torch& torch, const Bucket& bucket, int64_t i, const int64_t* shape,
                        uint64_t* address) {
  const Tensor grad = torch.grad_of(bucket.params[i]);
  if (*grad == torch.undefined) return STALE;
  if (torch.shape && find(torch, *grad, bucket.plain[1], address) &&
      is_shaped(torch, *grad, shape) && (*address || !has_elements(shape))) {
    if (!has_elements(shape)) *address = 0;  // as torch has it
    return SAME;
  }
  if (torch.shape && is_odd(torch, *grad)) return STALE;
  if (!is_kind(torch, grad, bucket.kind)) return STALE;
  const Status layout = compare(torch, grad, shape);
  if (layout == STALE || torch.data_ptr(grad, address)) return STALE;
  return !*address && has_elements(shape) ? STALE : layout;
}

// Look up parameter i, its gradient and its state, as it was kept.
static Status gather(const Torch& torch, const Bucket& bucket, int64_t i) {
  const int64_t n = bucket.n, *shape = bucket.shapes + bucket.starts[i];
  if (!is_same(torch, bucket.params[i], bucket.plain[0], bucket.table[i], shape)) return STALE;
  uint64_t address;
  const Status layout = find_grad(torch, bucket, i, shape, &address);
  // What is written before the last time that it is read must be no gradient.
  if (layout == STALE || (address && address == bucket.table[i])) return STALE;
  bucket.table[bucket.grad_row * n + i] = bucket.grads[bucket.places[i]] = address;
  for (int64_t k = 0; k < bucket.names; ++k) {
    if (bucket.rows[k] < 0) continue;
    const uint64_t expected = bucket.table[bucket.rows[k] * n + i];
    if (address && address == expected) return STALE;
    if (!is_same(torch, bucket.kept[k * n + i], bucket.plain[2 + k], expected, shape)) return STALE;
  }
  return layout;
}

// Whether the state of parameter i holds the objects that were kept.
static bool is_kept(const Torch& torch, const Bucket& bucket, int64_t i) {
  if (torch.tag && word(bucket.states[i], torch.tag) == bucket.tags[i]) return true;
  for (int64_t k = 0; k < bucket.names; ++k)
    if (torch.get_item(bucket.states[i], bucket.keys[k]) != bucket.kept[k * bucket.n + i])
      return false;
  if (torch.tag) bucket.tags[i] = word(bucket.states[i], torch.tag);
  return true;
}

static int gather(const Torch& torch, const Bucket& bucket, int64_t first, int64_t end) {
  int status = SAME;
  for (int64_t i = first; i < end; ++i) {
    prefetch(torch, bucket, i, end);
    const Status found = gather(torch, bucket, i);
    if (found == STALE) return STALE;
    status |= found;
  }
  return status;
}

extern "C" int compileclip_gather(const Torch* torch, const Bucket* bucket, int threads) {
  const int64_t n = bucket->n, blocks = (n + BLOCK - 1) / BLOCK;
  int status = SAME;
  if (!torch->shape) threads = 1;  // a tensor may have its shape from Python, and wait for its lock
#pragma omp parallel num_threads(threads) if (threads > 1 && blocks > 1) reduction(| : status)
  {
// Python is for the thread that called, which holds its lock.
#pragma omp master
    for (int64_t i = 0; i < n && status != STALE; ++i) {
      prefetch_state(*torch, *bucket, i);
      if (!is_kept(*torch, *bucket, i)) status = STALE;
    }
#pragma omp for schedule(dynamic)
    for (int64_t k = 0; k < blocks; ++k)
      status |= gather(*torch, *bucket, k * BLOCK, k * BLOCK + BLOCK < n ? k * BLOCK + BLOCK : n);
  }
  return status & STALE ? STALE : status;
}

static void note_written(const Torch& torch, void* held) {
  char* const version = torch.version_of(held);
  if (!version) return;
  // Not in one piece, which takes ten times as long: nobody else may write to what a step writes.
  uint32_t* const number = (uint32_t*)(version + torch.number);
  __atomic_store_n(number, __atomic_load_n(number, __ATOMIC_RELAXED) + 1, __ATOMIC_RELAXED);
}

// Have tensors in the cache that Python is about to look at, one miss of which takes it as long as
// ten look-ups: the objects, what they hold, their versions and their gradients.
extern "C" void compileclip_fetch(const Torch* torch, const Object* tensors, int64_t n) {
  for (int64_t i = -24; i < n; ++i) {
    if (i + 24 < n) prefetch(tensors[i + 24], 2);
    if (i >= -16 && i + 16 < n) prefetch(*torch->tensor(tensors[i + 16]), TENSOR);
    if (i >= -8 && i + 8 < n) {
      prefetch(torch->version_of(*torch->tensor(tensors[i + 8])), 1);
      prefetch(torch->grad_of(tensors[i + 8]), 1);
    }
    if (i >= 0) prefetch(*torch->grad_of(tensors[i]), TENSOR);
  }
}

// Count the versions of parameters, and of gradients if these are written too; 0 if nobody can.
extern "C" int compileclip_note_written(const Torch* torch, const Bucket* bucket, int grads) {
  if (!torch->version) return 0;
  const int64_t n = bucket->n;
  for (int64_t i = 0; i < n; ++i) {
    if (i + 24 < n) prefetch(torch->tensor(bucket->params[i + 24]), 1);
    if (i + 16 < n) prefetch(*torch->tensor(bucket->params[i + 16]), 1);
    if (i + 8 < n) prefetch(torch->version_of(*torch->tensor(bucket->params[i + 8])), 1);
    note_written(*torch, *torch->tensor(bucket->params[i]));
    if (grads) note_written(*torch, *torch->grad_of(bucket->params[i]));
  }
  return 1;
}
"""
