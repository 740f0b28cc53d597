// The convolution over the positions, and SiLU. x may be a part of wider rows; the output is cut into pieces.
#include "vectors.h"

namespace {

constexpr int MAX_WIDTH = 8, MAX_PIECES = 8;

struct Conv {
  int64_t batch, length, channels, width, ahead, batch_stride, row_stride, pieces;
  const float *x, *taps, *bias;  // taps (width, channels)
  const uint8_t* fresh;          // as for the scan
  int64_t sizes[MAX_PIECES];

  int64_t centre() const { return width - 1 - ahead; }
  // The taps [low, high) of position t that lie inside its own sequence.
  void reach(int64_t b, int64_t t, int64_t& low, int64_t& high) const {
    low = std::max<int64_t>(0, centre() - t);
    high = std::min(width, centre() + length - t);
    if (!fresh) return;
    const uint8_t* begins = fresh + b * length + t - centre();
    for (int64_t k = low + 1; k <= centre(); ++k)
      if (begins[k]) low = k;
    for (int64_t k = high - 1; k > centre(); --k)
      if (begins[k]) high = k;
  }
};

void conv_forward(const Conv& c, float* const* y, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.length; ++t) {
      int64_t low, high, start = 0;
      c.reach(b, t, low, high);
      const float* x = c.x + b * c.batch_stride + (t - c.centre()) * c.row_stride;
      for (int64_t piece = 0; piece < c.pieces; start += c.sizes[piece++]) {
        float* to = y[piece] + (b * c.length + t) * c.sizes[piece];
        for (int64_t i = 0; i < c.sizes[piece]; i += LANES) {
          int64_t channel = start + i, count = c.sizes[piece] - i;
          Vec v = load_part(c.bias + channel, count);
          for (int64_t k = low; k < high; ++k)
            v += load_part(c.taps + k * c.channels + channel, count) * load_part(x + k * c.row_stride + channel, count);
          store_part(to + i, v / (1.f + exp(-v)), count);
        }
      }
    }
}

// Sixteen channels of a row: dtaps (width + 1, channels), the last for the bias; dx starts as zeros.
template <bool WHOLE>
void conv_backward(const Conv& c, int64_t b, int64_t channel, int64_t count, const float* dy, int64_t dy_stride, float* dx, float* dtaps) {
  if (WHOLE) count = LANES;
  Vec taps[MAX_WIDTH], sums[MAX_WIDTH + 1]{}, bias = load_part(c.bias + channel, count);
  for (int64_t k = 0; k < c.width; ++k) taps[k] = load_part(c.taps + k * c.channels + channel, count);
  const float* x = c.x + b * c.batch_stride - c.centre() * c.row_stride + channel;
  dx += b * c.length * c.channels - c.centre() * c.channels + channel;
  for (int64_t t = 0; t < c.length; ++t) {
    int64_t low, high;
    c.reach(b, t, low, high);
    Vec v = bias;
    for (int64_t k = low; k < high; ++k) v += taps[k] * load_part(x + (t + k) * c.row_stride, count);
    Vec gate = 1.f / (1.f + exp(-v));
    Vec g = load_part(dy + t * dy_stride, count) * gate * (1.f + v * (1.f - gate));
    sums[c.width] += g;
    for (int64_t k = low; k < high; ++k) {
      sums[k] += g * load_part(x + (t + k) * c.row_stride, count);
      float* to = dx + (t + k) * c.channels;
      store_part(to, load_part(to, count) + g * taps[k], count);
    }
  }
  for (int64_t k = 0; k <= c.width; ++k) store_part(dtaps + (b * (c.width + 1) + k) * c.channels + channel, sums[k], count);
}

void conv_backward(const Conv& c, const float* const* dy, float* dx, float* dtaps, int threads) {
  for (int64_t piece = 0, start = 0; piece < c.pieces; start += c.sizes[piece++]) {
    int64_t size = c.sizes[piece];
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t i = 0; i < size; i += LANES) {
        auto part = size - i >= LANES ? conv_backward<true> : conv_backward<false>;
        part(c, b, start + i, size - i, dy[piece] + b * c.length * size + i, size, dx, dtaps);
      }
  }
}

}  // namespace

extern "C" {

void llmrec_conv_forward(const Conv* c, float* const* y, int threads) { conv_forward(*c, y, threads); }

// dtaps: (batch, width + 1, channels)
void llmrec_conv_backward(const Conv* c, const float* const* dy, float* dx, float* dtaps, int threads) {
  conv_backward(*c, dy, dx, dtaps, threads);
}
}
