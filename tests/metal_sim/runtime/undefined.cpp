// Handlers of UndefinedBehaviorSanitizer: the data block of each begins with the source position.
#include "state.h"

struct Location {
  const char* file;
  unsigned line, column;
};
#define HANDLER(name, text)                                                                       \
  void __ubsan_handle_##name(Location* at, ...) {                                                 \
    sim::report("undefined behaviour", text, 0, {at->file, at->line});                            \
  }
extern "C" {
HANDLER(out_of_bounds, "index out of the bounds of its array")
HANDLER(shift_out_of_bounds, "shift amount out of range")
HANDLER(float_cast_overflow, "float to integer conversion out of range (saturates on Metal, not here)")
HANDLER(load_invalid_value, "invalid bool or enum value")
HANDLER(builtin_unreachable, "unreachable code")
HANDLER(missing_return, "missing return")
HANDLER(add_overflow, "signed overflow")
HANDLER(sub_overflow, "signed overflow")
HANDLER(mul_overflow, "signed overflow")
HANDLER(negate_overflow, "signed overflow")
HANDLER(pointer_overflow, "pointer overflow")
// An access beside a private array whose size the compiler knows: it would destroy the thread's stack.
void __ubsan_handle_local_out_of_bounds_abort() {
  sim::report("out of bounds", "access beside a private array", (uintptr_t)__builtin_return_address(0), {nullptr, 0});
  sim::abort_dispatch();
}
// The access and the division themselves would end the process.
void __ubsan_handle_type_mismatch_v1(Location* at, ...) {
  sim::report("undefined behaviour", "misaligned or null access", 0, {at->file, at->line});
  sim::abort_dispatch();
}
void __ubsan_handle_divrem_overflow(Location* at, ...) {
  sim::report("undefined behaviour", "integer division by zero", 0, {at->file, at->line});
  sim::abort_dispatch();
}
}
