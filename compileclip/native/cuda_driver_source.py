"""The C++ of ``cuda_driver.py``: copies out of pinned memory, by the driver's own functions."""

from __future__ import annotations

SOURCE = r"""
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Functions of CUDA's driver, by which name ``native/cuda_driver.py`` knows. They return 0, or what
// went wrong.
struct Driver {
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned shared, void* stream, void** arguments, void** extra);
  int (*copy)(uint64_t place, const void* from, size_t bytes, void* stream);
  int (*capture_status)(void* stream, int* status);
  int (*current_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*make_event)(void** event, unsigned flags);
  int (*record)(void* event, void* stream);
  int (*query)(void* event);
  int (*pin)(void** place, size_t bytes, unsigned flags);
  int (*exchange_capture_mode)(int* mode);
  void* context;  // of the device
  int64_t pid;    // of the process that made this: a forked one cannot use the device
};

// Memory that the device copies from without the host's waiting. A slot is used again once the
// copy out of it is done, which its event tells; none is ever given back to the driver.
struct Slot {
  void* host;
  void* event;
  Slot* next;
};

struct Queue {
  void* context;
  Slot *first, *last;
  Queue* next;
};

constexpr int SIZES = 48, SMALLEST = 12;  // powers of two, of bytes
constexpr int LOOKS = 4;                  // slots that are asked whether they are free
constexpr unsigned NO_TIMING = 2, PORTABLE = 1;
constexpr int RELAXED = 2;  // in this capture mode memory may be pinned
static Queue* queues[SIZES];

static int size_class(int64_t bytes) {
  int k = SMALLEST;
  while ((int64_t(1) << k) < bytes) ++k;
  return k;
}

static Queue* queue_of(const Driver& driver, int k) {
  for (Queue* queue = queues[k]; queue; queue = queue->next)
    if (queue->context == driver.context) return queue;
  Queue* const made = (Queue*)calloc(1, sizeof(Queue));
  if (!made) return nullptr;
  made->context = driver.context, made->next = queues[k];
  return queues[k] = made;
}

static void put_back(Queue* queue, Slot* slot) {
  slot->next = nullptr;
  (queue->last ? queue->last->next : queue->first) = slot;
  queue->last = slot;
}

static int make_slot(const Driver& driver, int k, Slot** made) {
  Slot* const slot = (Slot*)calloc(1, sizeof(Slot));
  if (!slot) return 2;  // out of memory, as the driver calls it
  int mode = RELAXED;
  int status = driver.exchange_capture_mode(&mode);
  if (!status) {
    status = driver.pin(&slot->host, size_t(1) << k, PORTABLE);
    if (!status) status = driver.make_event(&slot->event, NO_TIMING);
    driver.exchange_capture_mode(&mode);
  }
  if (status)
    free(slot);
  else
    *made = slot;
  return status;
}

// A slot out of which no copy is under way.
static int take_slot(const Driver& driver, Queue* queue, int k, Slot** taken) {
  for (int look = 0; look < LOOKS && queue->first; ++look) {
    Slot* const slot = queue->first;
    queue->first = slot->next;
    if (!queue->first) queue->last = nullptr;
    if (driver.query(slot->event) == 0) {
      *taken = slot;
      return 0;
    }
    put_back(queue, slot);
  }
  return make_slot(driver, k, taken);
}

// Copy to the device, in the stream's order, what "from" holds now.
static int copy(const Driver& driver, uint64_t place, const void* from, int64_t bytes,
                void* stream) {
  const int k = size_class(bytes);
  Queue* const queue = queue_of(driver, k);
  if (!queue) return 2;
  Slot* slot = nullptr;
  int status = take_slot(driver, queue, k, &slot);
  if (status) return status;
  memcpy(slot->host, from, bytes);
  status = driver.copy(place, slot->host, bytes, stream);
  if (!status) status = driver.record(slot->event, stream);
  if (!status) put_back(queue, slot);  // else nobody knows when it is free
  return status;
}

// With the device's context, whatever is current.
struct Within {
  const Driver& driver;
  bool pushed = false;
  int status = 0;

  explicit Within(const Driver& given) : driver(given) {
    void* current = nullptr;
    status = driver.current_context(&current);
    if (!status && current != driver.context) {
      status = driver.push_context(driver.context);
      pushed = !status;
    }
  }
  ~Within() {
    void* popped;
    if (pushed) driver.pop_context(&popped);
  }
};

extern "C" int compileclip_copy(const Driver* driver, uint64_t place, const void* from,
                                int64_t bytes, void* stream) {
  if (driver->pid != getpid()) return -1;
  const Within within(*driver);
  return within.status ? within.status : copy(*driver, place, from, bytes, stream);
}

// As ``compileclip_copy``, in a capture: each replay reads the slot, until it is given back.
extern "C" int compileclip_copy_captured(const Driver* driver, uint64_t place, const void* from,
                                         int64_t bytes, void* stream, Slot** kept) {
  const Within within(*driver);
  if (within.status) return within.status;
  const int status = make_slot(*driver, size_class(bytes), kept);
  if (status) return status;
  memcpy((*kept)->host, from, bytes);
  return driver->copy(place, (*kept)->host, bytes, stream);
}

extern "C" void compileclip_give_back(const Driver* driver, int64_t bytes, Slot* slot) {
  const int k = size_class(bytes);
  Queue* const queue = queue_of(*driver, k);
  if (queue) put_back(queue, slot);  // an event that was never recorded counts as done
}
"""
