// C interface between compiled kernels and the runtime of the simulator.
#pragma once

typedef __UINT32_TYPE__ msl_u32;

extern "C" {
// Facts of one thread, filled in by the runtime before the thread starts. air.py knows the byte offsets.
struct msl_thread {
  unsigned pos_in_grid[3];
  unsigned pos_in_tg[3];
  unsigned tg_pos[3];
  unsigned tg_size[3];  // of this threadgroup, which is smaller at the edge of the grid
  unsigned grid[3];
  unsigned ntg[3];
  unsigned disp_tg[3];  // as dispatched
  unsigned idx_in_tg;
  unsigned lane;
  unsigned simdgroup;
  unsigned nsimdgroups;
  void** buffers;
};
extern __attribute__((visibility("default"))) msl_thread* msl_self;

enum { MSL_SUM, MSL_PROD, MSL_MIN, MSL_MAX, MSL_AND, MSL_OR, MSL_XOR };
enum { MSL_SCAN_INC, MSL_SCAN_EXC };
enum { MSL_SHUF_IDX, MSL_SHUF_XOR, MSL_SHUF_UP, MSL_SHUF_DOWN, MSL_ROT_UP, MSL_ROT_DOWN };
enum { MSL_T_F32, MSL_T_F16, MSL_T_I32, MSL_T_U32 };

// Every operation ends with the source position of its call. Values go in and out through the first pointer.
void msl_reduce(void* value, int type, int op, int width, const char* file, unsigned line);
void msl_scan(void* value, int type, int op, int kind, const char* file, unsigned line);
void msl_shuffle(void* value, unsigned size, int mode, int argument, const void* fill, int modulo, int width,
                 const char* file, unsigned line);
msl_u32 msl_ballot(bool value, const char* file, unsigned line);
void msl_mma(float* d2, const float* a2, const float* b2, const float* c2, const char* file, unsigned line);
void msl_tg_barrier(unsigned flags, const char* file, unsigned line);
void msl_sg_barrier(unsigned flags, const char* file, unsigned line);
void* msl_tg_alloc(unsigned id, unsigned long size, unsigned align, const char* name, bool zero);
void msl_atomic_access(const void* address, unsigned size, int is_write);
void msl_fail(const char* message, const char* file, unsigned line);
}
