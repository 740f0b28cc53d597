// y = x W^T + bias for a few rows x (rows, in), W (out, in): one stream through W, at the speed of memory.
#include "vectors.h"

namespace {

template <int ROWS> void matvec(int64_t in, int64_t out, const float* W, const float* x, const float* bias, float* y, int threads) {
  constexpr int UNROLLED = 4;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t o = 0; o < out; ++o) {
    const float* w = W + o * in;
    Vec acc[ROWS][UNROLLED]{};
    int64_t i = 0;
    for (; i + UNROLLED * LANES <= in; i += UNROLLED * LANES)
      for (int u = 0; u < UNROLLED; ++u)
        for (int r = 0; r < ROWS; ++r) acc[r][u] += load(w + i + u * LANES) * load(x + r * in + i + u * LANES);
    for (; i < in; i += LANES)
      for (int r = 0; r < ROWS; ++r) acc[r][0] += load_part(w + i, in - i) * load_part(x + r * in + i, in - i);
    for (int r = 0; r < ROWS; ++r) y[r * out + o] = sum((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3])) + (bias ? bias[o] : 0.f);
  }
}

}  // namespace

extern "C" {

void llmrec_matvec(int64_t rows, int64_t in, int64_t out, const float* W, const float* x, const float* bias, float* y, int threads) {
  for (int64_t r = 0; r < rows;) {
    int64_t step = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
    auto run = step == 4 ? matvec<4> : step == 2 ? matvec<2> : matvec<1>;
    run(in, out, W, x + r * in, bias, y + r * out, threads);
    r += step;
  }
}
}
