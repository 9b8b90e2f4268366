// State of one dispatch: threads as fibers, SIMD-groups, buffers, threadgroup variables, reports.
#pragma once
#include "interface.h"
#include "libc.h"

namespace sim {

constexpr unsigned kStackBytes = 256u << 10;
constexpr unsigned kArenaBytes = 256u << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kLineBytes = 128;
constexpr int kMaxBuffers = 64, kMaxVariables = 64, kMaxReports = 64, kMaxOutputs = 16;

enum Wait { kNotWaiting, kAtSimdOp, kAtBarrier, kExited };
enum OpKind { kReduce, kScan, kShuffle, kBallot, kMatrix, kSimdBarrier };
enum Memory { kThreadgroup, kDevice };
enum BarrierFlag { kFlagDevice = 1, kFlagThreadgroup = 2 };  // Metal's mem_flags

struct Site {
  const char* file;
  unsigned line;
  bool operator==(const Site& o) const { return file == o.file && line == o.line; }
};

struct SimdGroup;

struct Fiber {
  void* sp;
  uintptr_t stack;
  SimdGroup* group;
  unsigned lane, bit;
  int wait, kind;
  Site site;             // of the operation it waits at
  unsigned flags;        // of that barrier
  const void* deposit;   // what it gives to that SIMD operation
  unsigned deposit_size;
  int parity;            // where the operation left the deposits of all lanes
  msl_thread thread;
};

struct SimdGroup {
  unsigned all, live, runnable, arrived;  // masks of lanes
  int parity;
  bool is_mixed;                          // lanes wait at different operations
  Fiber* first;                           // the first that arrived
  unsigned mask[2];                       // lanes of the operation, by parity
  bool has_result[2];
  unsigned epoch[2];                      // SIMD-group barriers passed, by Memory
  Fiber* fibers;
  alignas(64) unsigned char slot[2][32][64];
  alignas(64) float result[2][64];
};

enum BufferFlag { kWritable = 1, kInitialized = 2 };

// Who touched one element last: threadgroup serial, thread, threadgroup epoch, SIMD-group epoch, code address.
struct Touch {
  uint32_t serial, epoch, simd_epoch, pc;
  uint16_t thread;
  uint8_t is_atomic;
};
enum Readers { kNoReader, kOneReader, kOneSimdGroup, kSeveral };
struct Cell {
  Touch write, read;
  uint8_t is_written, readers;
};

// What SIMD-groups ask of one buffer: the bytes of all lanes, each access's bytes counted once, its lines, and its number.
struct Asked {
  long lane_bytes, bytes, lines, accesses;
};

struct Buffer {
  uintptr_t begin, end;
  int flags;
  unsigned element_size;
  const char* name;
  Cell* cells;
  int argument;
  Asked asked[2];          // reads, writes
  unsigned char* touched;  // of each byte, bit 0: read, bit 1: written
};

// A threadgroup array: its place holds for all threadgroups of a dispatch, its contents for the one of that serial.
struct Variable {
  unsigned id, offset, size, element_size;
  const char* name;
  bool is_zeroed;
  uint32_t serial;
};

struct Options {
  int strict_divergence, early_exit, none_is_execution, simd_ops_order, reverse, check;
  int placement, threadgroup_bytes, count, every;
};

struct Report {
  char kind[64], message[800];
  uintptr_t pc;
  Site site;
  long count;
};

struct Counters {
  long accesses, switches, simd_ops, barriers, threadgroup_read, threadgroup_written;
};

struct State {
  Options options;
  Counters counters;
  void (*entry)();
  bool is_aborted;
  Fiber* current;
  void* main_sp;
  Fiber* fibers;
  SimdGroup* groups;
  char* stacks;

  Buffer buffers[kMaxBuffers];
  int n_buffers, last_buffer;
  void* pointers[kMaxBuffers];

  char* arena;       // threadgroup memory
  Cell* arena_cells;
  Variable variables[kMaxVariables];
  int n_variables;
  unsigned arena_bytes;  // that the variables take, each padded
  uint32_t random;

  uint32_t serial;   // of the threadgroup
  uint32_t epoch[2]; // threadgroup barriers passed, by Memory
  uintptr_t module_begin, module_end;

  Report reports[kMaxReports];
  int n_reports;
};
extern State state;

// scheduler.cpp
int simd_op(OpKind kind, const void* deposit, unsigned size, unsigned flags, Site site);
void start_fiber(Fiber& f);
void run_group(SimdGroup& group);
[[noreturn]] void abort_dispatch();

// reports.cpp
void report(const char* kind, const char* message, uintptr_t pc, Site site);
struct Text {
  char text[400];
};
Text describe(const Fiber& f);
Text describe_address(uintptr_t address);

// access.cpp
void access(uintptr_t address, unsigned size, bool is_write, bool is_atomic, uintptr_t pc);
void finish_pending_write(bool is_aborted);

// traffic.cpp
void count_access(Buffer& b, uintptr_t address, unsigned size, bool is_write, uintptr_t pc);
void settle_traffic();

}  // namespace sim
