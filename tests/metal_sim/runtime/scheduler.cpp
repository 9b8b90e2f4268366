// Threads as fibers: they run until a SIMD operation, a barrier or their end, and SIMD-groups move in step there.
#include "state.h"

extern "C" {
msl_thread* msl_self;
void msl_switch(void** save, void* load);
}
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch,.-msl_switch
)");

namespace sim {

State state;

static void enter(Fiber* to) {
  state.current = to;
  msl_self = &to->thread;
}

// The next lane of the group: the lowest, or the highest in reverse order.
static Fiber* pick(SimdGroup* g) {
  unsigned lanes = g->runnable;
  return g->fibers + (state.options.reverse ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes));
}

static void leave(void** save, SimdGroup* g) {
  if (__builtin_expect(g->runnable != 0, 1)) {
    Fiber* next = pick(g);
    enter(next);
    msl_switch(save, next->sp);
  } else {
    state.current = nullptr;
    msl_switch(save, state.main_sp);
  }
}

[[noreturn]] void abort_dispatch() {
  state.is_aborted = true;
  void* unused;
  msl_switch(&unused, state.main_sp);
  __builtin_unreachable();
}

static void count_epoch(unsigned* epoch, unsigned flags) {
  if (flags & kFlagThreadgroup) epoch[kThreadgroup]++;
  if (flags & kFlagDevice) epoch[kDevice]++;
  if (!flags && state.options.none_is_execution) {
    epoch[kThreadgroup]++;
    epoch[kDevice]++;
  }
}

// Collects the deposits of the lanes in the mask and lets them run on.
static void complete(SimdGroup* g, unsigned mask) {
  int parity = g->parity;
  g->parity ^= 1;
  g->mask[parity] = mask;
  g->has_result[parity] = false;
  state.counters.simd_ops++;
  if (__builtin_expect(state.options.count, 0)) settle_traffic();
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Fiber& f = g->fibers[__builtin_ctz(rest)];
    f.parity = parity;
    f.wait = kNotWaiting;
    if (f.deposit_size == 4) memcpy(g->slot[parity][f.lane], f.deposit, 4);
    else memcpy(g->slot[parity][f.lane], f.deposit, f.deposit_size);
  }
  const Fiber& first = g->fibers[__builtin_ctz(mask)];
  if (__builtin_expect(mask != g->all, 0) && state.options.strict_divergence) {
    char message[500];
    snprintf(message, sizeof message, "SIMD operation reached by lanes %08x of %08x (%08x live): %s", mask, g->all,
             g->live, describe(first).text);
    report("divergence", message, 0, first.site);
  }
  if (first.kind == kSimdBarrier) {
    count_epoch(g->epoch, first.flags);
  } else if (state.options.simd_ops_order) {
    g->epoch[kThreadgroup]++;
    g->epoch[kDevice]++;
  }
  g->arrived &= ~mask;
  g->runnable |= mask;
  g->is_mixed = false;
}

static bool is_same_op(const Fiber& a, const Fiber& b) { return a.site == b.site && a.kind == b.kind; }

// Waits until the group is there; returns the parity under which the deposits lie.
int simd_op(OpKind kind, const void* deposit, unsigned size, unsigned flags, Site site) {
  Fiber* me = state.current;
  SimdGroup* g = me->group;
  me->wait = kAtSimdOp;
  me->kind = kind;
  me->site = site;
  me->deposit = deposit;
  me->deposit_size = size;
  me->flags = flags;
  if (!g->arrived) g->first = me;
  else if (!is_same_op(*g->first, *me)) g->is_mixed = true;
  g->arrived |= me->bit;
  g->runnable &= ~me->bit;
  if (g->arrived == g->live && !g->is_mixed) {
    complete(g, g->live);
  } else {
    state.counters.switches++;
    leave(&me->sp, g);
  }
  return me->parity;
}

static void fiber_main() {
  state.entry();
  Fiber* me = state.current;
  me->wait = kExited;
  me->group->live &= ~me->bit;
  me->group->runnable &= ~me->bit;
  void* unused;
  leave(&unused, me->group);
  __builtin_unreachable();
}

void start_fiber(Fiber& f) {
  f.wait = kNotWaiting;
  void** sp = (void**)(f.stack + kStackBytes - 64);
  *--sp = nullptr;
  *--sp = (void*)fiber_main;
  for (int saved = 0; saved < 6; saved++) *--sp = nullptr;
  f.sp = sp;
}

// Lanes wait, not all at one operation: lets those at the first lane's operation pass.
static void complete_divergent(SimdGroup& g) {
  const Fiber& first = g.fibers[__builtin_ctz(g.arrived)];
  unsigned mask = 0;
  for (unsigned rest = g.arrived; rest; rest &= rest - 1) {
    const Fiber& f = g.fibers[__builtin_ctz(rest)];
    if (is_same_op(f, first)) mask |= f.bit;
  }
  complete(&g, mask);
  if (!g.arrived) return;
  g.first = g.fibers + __builtin_ctz(g.arrived);
  for (unsigned rest = g.arrived; rest; rest &= rest - 1)
    if (!is_same_op(g.fibers[__builtin_ctz(rest)], *g.first)) g.is_mixed = true;
}

// Runs a group until all its lanes wait at a threadgroup barrier or have returned.
void run_group(SimdGroup& g) {
  while (!state.is_aborted) {
    if (g.runnable) {
      Fiber* f = pick(&g);
      enter(f);
      msl_switch(&state.main_sp, f->sp);
      state.current = nullptr;
    } else if (g.arrived) {
      complete_divergent(g);
    } else {
      if (state.options.count) settle_traffic();
      return;
    }
  }
}

}  // namespace sim

extern "C" {
void msl_tg_barrier(unsigned flags, const char* file, unsigned line) {
  sim::Fiber* me = sim::state.current;
  me->wait = sim::kAtBarrier;
  me->site = {file, line};
  me->flags = flags;
  me->group->runnable &= ~me->bit;
  sim::state.counters.switches++;
  sim::leave(&me->sp, me->group);
}
void msl_sg_barrier(unsigned flags, const char* file, unsigned line) {
  int nothing = 0;
  sim::simd_op(sim::kSimdBarrier, &nothing, 4, flags, {file, line});
}
void msl_fail(const char* message, const char* file, unsigned line) {
  sim::report("failure", message, 0, {file, line});
  sim::abort_dispatch();
}
}
