// Stands in for torch's thread pool in threads.cpp: the same C interface on plain threads, which
// the thread sanitizer understands. It cannot see how libgomp's threads wait for each other, so
// with torch itself it reports false races.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" int torch_get_num_threads(uint32_t* count) {
  *count = 4;
  return 0;
}

extern "C" int torch_parallel_for(int64_t begin,
                                  int64_t end,
                                  int64_t grain,
                                  void (*body)(int64_t, int64_t, void*),
                                  void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain) {
    threads.emplace_back(body, i, std::min(end, i + grain), context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
