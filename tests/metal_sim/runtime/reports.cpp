// What the runtime found: one report for each kind and place, in words a kernel author can use.
#include "state.h"

namespace sim {

void report(const char* kind, const char* message, uintptr_t pc, Site site) {
  for (int i = 0; i < state.n_reports; i++) {
    Report& r = state.reports[i];
    if (!strcmp(r.kind, kind) && r.pc == pc && r.site.line == site.line) {
      r.count++;
      return;
    }
  }
  if (state.n_reports == kMaxReports) return;
  Report& r = state.reports[state.n_reports++];
  snprintf(r.kind, sizeof r.kind, "%s", kind);
  snprintf(r.message, sizeof r.message, "%s", message);
  r.pc = pc;
  r.site = site;
  r.count = 1;
}

Text describe(const Fiber& f) {
  const msl_thread& t = f.thread;
  Text out;
  snprintf(out.text, sizeof out.text, "thread %u (simdgroup %u lane %u) of threadgroup (%u,%u,%u)", t.idx_in_tg,
           t.simdgroup, t.lane, t.tg_pos[0], t.tg_pos[1], t.tg_pos[2]);
  return out;
}

Text describe_address(uintptr_t address) {
  Text out;
  for (int i = 0; i < state.n_variables; i++) {
    const Variable& v = state.variables[i];
    uintptr_t begin = (uintptr_t)state.arena + v.offset;
    if (address + 256 >= begin && address < begin + v.size + 256) {
      snprintf(out.text, sizeof out.text, "threadgroup '%s' (%u bytes), byte offset %ld", v.name, v.size,
               (long)(address - begin));
      return out;
    }
  }
  const long kNear = 1L << 30;
  const Buffer* nearest = nullptr;
  long best = kNear;
  for (int i = 0; i < state.n_buffers; i++) {
    const Buffer& b = state.buffers[i];
    long distance = address < b.begin ? (long)(b.begin - address) : address >= b.end ? (long)(address - b.end) : 0;
    if (distance < best) {
      best = distance;
      nearest = &b;
    }
  }
  if (!nearest) {
    snprintf(out.text, sizeof out.text, "address %p, near no buffer", (void*)address);
    return out;
  }
  long index = (long)((double)(long)(address - nearest->begin) / nearest->element_size);
  snprintf(out.text, sizeof out.text, "nearest buffer '%s' (%ld elements of %u bytes), element index %ld",
           nearest->name, (long)((nearest->end - nearest->begin) / nearest->element_size), nearest->element_size,
           index);
  return out;
}

}  // namespace sim

extern "C" int msl_report(int i, char* kind, char* message, unsigned long* pc, char* file, unsigned* line, long* count) {
  if (i >= sim::state.n_reports) return 0;
  const sim::Report& r = sim::state.reports[i];
  snprintf(kind, sizeof r.kind, "%s", r.kind);
  snprintf(message, sizeof r.message, "%s", r.message);
  snprintf(file, 256, "%s", r.site.file ? r.site.file : "");
  *pc = r.pc ? r.pc - sim::state.module_begin : 0;
  *line = r.site.line;
  *count = r.count;
  return 1;
}
