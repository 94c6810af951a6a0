"""The C++ of ``pointers.Surroundings``: whether an optimizer is still what it was.

It follows the code of ``native_tensors_source.py`` in one library.
"""

from __future__ import annotations

SOURCE = r"""
struct Objects {
  int64_t n;
  const Object* objects;
};

// The parameters and state dictionaries of an optimizer.
struct Optimizer {
  int64_t groups, params_key;   // of a group's parameters, a string
  const Objects* params;        // of each group
  Objects owners, states;       // keys and values of the optimizer's state
  Objects without, refused;     // no gradient; a gradient, but in no bucket
};

static bool is_same(const Torch& torch, Object list, const Objects& before) {
  if (torch.length(list) != before.n) return false;
  for (int64_t i = 0; i < before.n; ++i)
    if (torch.get_entry(list, i) != before.objects[i]) return false;
  return true;
}

static bool have_grad(const Torch& torch, const Objects& params, bool expected) {
  for (int64_t i = 0; i < params.n; ++i)
    if ((*torch.grad_of(params.objects[i]) != torch.undefined) != expected) return false;
  return true;
}

// Whether an optimizer's groups, state and missing gradients are what they were.
extern "C" int compileclip_same(const Torch* torch, const Optimizer* before, Object groups,
                                Object state) {
  if (torch->length(groups) != before->groups) return 0;
  for (int64_t i = 0; i < before->groups; ++i) {
    const Object list = torch->get_item(torch->get_entry(groups, i), (Object)before->params_key);
    if (!list || !is_same(*torch, list, before->params[i])) return 0;
  }
  Object key, value;
  int64_t position = 0, i = 0;
  for (; torch->next(state, &position, &key, &value); ++i)
    if (i >= before->owners.n || key != before->owners.objects[i] ||
        value != before->states.objects[i])
      return 0;
  return i == before->owners.n && have_grad(*torch, before->without, false) &&
         have_grad(*torch, before->refused, true);
}
"""
