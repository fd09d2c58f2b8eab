// Steps two models at once, each on four threads, while a third thread switches instruction sets:
// for the thread sanitizer. The results must be those of one thread.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/engine.hpp"

using namespace pyoptim;

namespace {

// Tasks of 64 Ki elements that hold many rows, end inside a row, end at its end, and cut a row in
// several.
constexpr int64_t kSizes[] = {1, 7, 0, 65'528, 65'536, 65'537, 3, 300'000, 1};
constexpr int kSteps = 3;
constexpr double kInvScale = 0.5;

struct Model {
  std::vector<std::vector<float>> arrays;  // param, grad, exp_avg, exp_avg_sq of each row
  std::vector<TableRow> rows;
  std::vector<HyperBlock> hypers = std::vector<HyperBlock>(1);

  Model() {
    const cpu::KernelTable& kernels = cpu::active_kernels();
    for (const int64_t numel : kSizes) {
      TableRow row = {};
      float* const memory[] = {
          array(numel, 1.0f), array(numel, 0.1f), array(numel, 0.0f), array(numel, 0.0f)};
      row.param = memory[0];
      row.source = memory[0];
      row.grad = memory[1];
      row.state[0] = memory[2];
      row.state[1] = memory[3];
      row.numel = numel;
      row.update =
          kernels.update[static_cast<int>(RuleId::Adam)][0][static_cast<int>(DTypeSet::f32)];
      row.unscale = kernels.unscale[static_cast<int>(DType::f32)];
      rows.push_back(row);
    }
  }

  float* array(int64_t numel, float scale) {
    std::vector<float> values(numel);
    for (int64_t i = 0; i < numel; ++i) values[i] = scale * static_cast<float>(i % 97 - 48);
    arrays.push_back(std::move(values));
    return arrays.back().data();
  }

  void run(bool by_engine) {
    constexpr double kRaw[Adam<float>::kHypers] = {1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 0.0};
    for (int step = 1; step <= kSteps; ++step) {
      const Adam<float>::Hyper hyper = Adam<float>::prepare(kRaw, step, step == 1);
      std::memcpy(hypers[0].bytes, &hyper, sizeof(hyper));
      by_engine ? update_by_engine() : update_each_row();
      // Reads the instruction set in every task, where a step reads it once for each row of its
      // table.
      cpu::stream(sizeof(float), {rows[7].grad}, {rows[7].param}, rows[7].numel, !by_engine);
    }
  }

  void update_by_engine() {
    std::vector<const TableRow*> table;
    for (const TableRow& row : rows) table.push_back(&row);
    cpu::update_rows(table, hypers, kInvScale);
  }

  void update_each_row() {
    for (const TableRow& row : rows) {
      row.unscale(row.grad, kInvScale, 0, row.numel);
      row.update(row, &hypers[row.hyper], 0, row.numel, nullptr);
    }
  }
};

void switch_isas() {
  for (int i = 0; i < 100; ++i) {
    for (const std::string& isa : cpu::supported_isas()) cpu::set_isa(isa);
  }
}

bool agree(const Model& a, const Model& b) { return a.arrays == b.arrays; }

}  // namespace

int main() {
  Model serial, first, second;
  std::thread one([&] { first.run(true); });
  std::thread two([&] { second.run(true); });
  std::thread three(switch_isas);
  serial.run(false);
  one.join();
  two.join();
  three.join();
  if (cpu::num_threads() != 4) return std::puts("FAILED: the engine ran on one thread"), 1;
  if (!agree(serial, first) || !agree(serial, second))
    return std::puts("FAILED: results differ"), 1;
  return std::puts("no race, and the results of one thread"), 0;
}
