// Reductions over tensors, cut into tasks of whole chunks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/engine.hpp"
#include "reduce/order.hpp"

namespace pyoptim::cpu {

// The first chunk of a task.
struct ChunkCut {
  size_t tensor;
  int64_t chunk;  // within the tensor
  int64_t index;  // among all chunks
};

// Task i runs from cuts[i] to cuts[i + 1]. Only whole chunks, of about kTaskElements together; a
// short one counts as a round of lanes, which is about what a call costs.
inline std::vector<ChunkCut> cut_chunks(const std::vector<int64_t>& numels) {
  std::vector<ChunkCut> cuts = {{0, 0, 0}};
  int64_t index = 0, filled = 0;
  for (size_t t = 0; t < numels.size(); ++t) {
    const int64_t n = reduce::n_chunks(numels[t]);
    for (int64_t c = 0; c < n; ++c, ++index) {
      if (filled >= kTaskElements) {
        cuts.push_back({t, c, index});
        filled = 0;
      }
      filled += std::clamp<int64_t>(numels[t] - c * reduce::kChunk, reduce::kLanes, reduce::kChunk);
    }
  }
  cuts.push_back({numels.size(), 0, index});
  return cuts;
}

// Calls visit(tensor, begin, end, index) for every chunk, in one parallel region.
template <class Visit>
void for_each_chunk(const std::vector<int64_t>& numels, const Visit& visit) {
  struct Work {
    const std::vector<int64_t>& numels;
    const Visit& visit;
    std::vector<ChunkCut> cuts;

    void run(int64_t task) const {
      const int64_t end = cuts[task + 1].index;
      ChunkCut at = cuts[task];
      for (; at.index < end; ++at.tensor, at.chunk = 0) {
        const int64_t numel = numels[at.tensor], n = reduce::n_chunks(numel);
        for (; at.chunk < n && at.index < end; ++at.chunk, ++at.index) {
          const int64_t begin = at.chunk * reduce::kChunk;
          visit(at.tensor, begin, std::min(begin + reduce::kChunk, numel), at.index);
        }
      }
    }
  };
  int64_t total = 0;
  for (const int64_t numel : numels) total += numel;
  Work work{numels, visit, cut_chunks(numels)};
  const auto run = [](int64_t i, void* w) { static_cast<const Work*>(w)->run(i); };
  run_tasks(static_cast<int64_t>(work.cuts.size()) - 1, total <= kSerialElements, run, &work);
}

}  // namespace pyoptim::cpu
