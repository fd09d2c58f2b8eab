// The CPU engine's reductions, in the order of reduce/order.hpp: raw memory in, float64 results
// out. Python-free and torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/api.hpp"
#include "reduce/order.hpp"

namespace pyoptim::cpu {

// Stage 1 of every norm: one result per chunk, chunks in order of the spans.
void partials(reduce::Kind kind,
              const std::vector<gpu::Span>& spans,
              double* out);  // [sum of reduce::n_chunks(numel)]

// Stage 2: the norm over n partial results.
double norm(reduce::Kind kind, const double* partials, int64_t n);

// x *= factor for every element, in the arithmetic of its dtype. No two spans may share memory.
void scale(const std::vector<gpu::Span>& spans, double factor);

void row_sums(const gpu::RowSums& rows);

}  // namespace pyoptim::cpu
