// The few functions of the C library that the runtime needs, declared here so that it builds without system headers.
#pragma once

typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT8_TYPE__ uint8_t;

extern "C" {
int snprintf(char*, size_t, const char*, ...);
void* memcpy(void*, const void*, size_t);
void* memmove(void*, const void*, size_t);
void* memset(void*, int, size_t);
int memcmp(const void*, const void*, size_t);
int strcmp(const char*, const char*);
void* calloc(size_t, size_t);
void free(void*);
void* mmap(void*, size_t, int, int, int, long);
int mprotect(void*, size_t, int);
struct dl_info {
  const char* file;
  void* base;
  const char* symbol;
  void* symbol_address;
};
int dladdr(const void*, dl_info*);
}

namespace sim {
constexpr int kReadWrite = 3;          // PROT_READ | PROT_WRITE
constexpr int kPrivate = 0x22;         // MAP_PRIVATE | MAP_ANONYMOUS
constexpr int kNoReserve = 0x4000;     // MAP_NORESERVE

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline void* map_memory(size_t size) { return mmap(nullptr, size, kReadWrite, kPrivate | kNoReserve, -1, 0); }
}  // namespace sim
