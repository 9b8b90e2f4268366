// What SIMD-groups ask of device memory. An access is one instruction of a SIMD-group: the n-th time that each of its lanes
// comes to one place of the code, counted from the last SIMD operation or barrier, where the lanes are in step.
#include "state.h"

namespace sim {

constexpr unsigned kMaxAccesses = 1u << 16, kBuckets = 1u << 17, kLanes = 32;

struct Interval {
  uintptr_t begin, end;
};
struct GroupAccess {
  uintptr_t pc;
  unsigned n;  // which of the accesses at this pc
  Buffer* buffer;
  bool is_write;
  unsigned lanes;
  Interval intervals[kLanes];
};
struct Place {  // of the code
  uintptr_t pc;
  unsigned count[kLanes];
};
// Open addressing; an entry of another era is empty.
struct Bucket {
  uint32_t era, index;
};

static struct {
  GroupAccess* accesses;
  Place* places;
  Bucket *access_at, *place_at;
  unsigned n_accesses, n_places;
  uint32_t era;
} open_accesses;

static void allocate_once() {
  auto& o = open_accesses;
  if (o.accesses) return;
  o.accesses = (GroupAccess*)map_memory(kMaxAccesses * sizeof(GroupAccess));
  o.places = (Place*)map_memory(kMaxAccesses * sizeof(Place));
  o.access_at = (Bucket*)map_memory(kBuckets * sizeof(Bucket));
  o.place_at = (Bucket*)map_memory(kBuckets * sizeof(Bucket));
  o.era = 1;
}

static unsigned first_bucket(uintptr_t pc, unsigned n) {
  return (unsigned)((pc * 0x9e3779b97f4a7c15ull + n * 0xc2b2ae3d27d4eb4full) >> 40) % kBuckets;
}

static Place& find_place(uintptr_t pc) {
  auto& o = open_accesses;
  unsigned b = first_bucket(pc, 0);
  for (; o.place_at[b].era == o.era; b = (b + 1) % kBuckets)
    if (o.places[o.place_at[b].index].pc == pc) return o.places[o.place_at[b].index];
  o.place_at[b] = {o.era, o.n_places};
  Place& made = o.places[o.n_places++];
  made = {pc, {}};
  return made;
}

static GroupAccess& find_access(uintptr_t pc, unsigned n, Buffer& buffer, bool is_write) {
  auto& o = open_accesses;
  unsigned b = first_bucket(pc, n + 1);
  for (; o.access_at[b].era == o.era; b = (b + 1) % kBuckets) {
    GroupAccess& found = o.accesses[o.access_at[b].index];
    if (found.pc == pc && found.n == n && found.buffer == &buffer && found.is_write == is_write) return found;
  }
  if (o.n_accesses == kMaxAccesses) {
    report("traffic", "too many accesses between two synchronisations to be counted", 0, {nullptr, 0});
    abort_dispatch();
  }
  o.access_at[b] = {o.era, o.n_accesses};
  GroupAccess& made = o.accesses[o.n_accesses++];
  made.pc = pc;
  made.n = n;
  made.buffer = &buffer;
  made.is_write = is_write;
  made.lanes = 0;
  return made;
}

void count_access(Buffer& buffer, uintptr_t address, unsigned size, bool is_write, uintptr_t pc) {
  allocate_once();
  unsigned n = find_place(pc).count[state.current->lane]++;
  GroupAccess& access = find_access(pc, n, buffer, is_write);
  // Kept in order of addresses, in which lanes mostly come.
  unsigned at = access.lanes++;
  for (; at > 0 && access.intervals[at - 1].begin > address; at--) access.intervals[at] = access.intervals[at - 1];
  access.intervals[at] = {address, address + size};
}

static void settle(const GroupAccess& access) {
  Buffer& b = *access.buffer;
  Asked& asked = b.asked[access.is_write];
  asked.accesses++;
  uintptr_t end = b.begin, next_line = 0;
  for (unsigned i = 0; i < access.lanes; i++) {
    Interval lane = access.intervals[i];
    asked.lane_bytes += lane.end - lane.begin;
    uintptr_t begin = max(lane.begin, end);
    if (begin >= lane.end) continue;
    end = lane.end;
    asked.bytes += end - begin;
    for (uintptr_t k = begin; k < end; k++) b.touched[k - b.begin] |= 1 << access.is_write;
    uintptr_t first = max((begin - b.begin) / kLineBytes, next_line), last = (end - 1 - b.begin) / kLineBytes;
    if (last + 1 > first) asked.lines += last + 1 - first;
    next_line = max(next_line, last + 1);
  }
}

void settle_traffic() {
  auto& o = open_accesses;
  for (unsigned i = 0; i < o.n_accesses; i++) settle(o.accesses[i]);
  o.n_accesses = o.n_places = 0;
  o.era++;
}

}  // namespace sim

// Of one argument: asked of reads and of writes, then how many of its bytes were read and written at all. Frees the record.
extern "C" void msl_traffic(int argument, long* out) {
  using namespace sim;
  for (int i = 0; i < 10; i++) out[i] = 0;
  for (int i = 0; i < state.n_buffers; i++) {
    Buffer& b = state.buffers[i];
    if (b.argument != argument || !b.touched) continue;
    memcpy(out, b.asked, sizeof b.asked);
    for (size_t k = 0; k < b.end - b.begin; k++)
      for (int w = 0; w < 2; w++) out[8 + w] += b.touched[k] >> w & 1;
    free(b.touched);
    b.touched = nullptr;
  }
}
