// What the compiler's own library would do where the processor has no instruction: float to bfloat, to nearest even.
extern "C" __bf16 __truncsfbf2(float x) {
  unsigned bits = __builtin_bit_cast(unsigned, x);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits = is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return __builtin_bit_cast(__bf16, (unsigned short)(bits >> 16));
}
