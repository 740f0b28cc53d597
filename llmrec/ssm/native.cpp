// The scans of Mamba-1 and Mamba-2 and the convolution before them, for CPUs; compiled on first use by native.py.
//
//   h_t = a_t h_{t-1} + v_t B_t,   y_t = h_t C_t + D x_t,   v = dt x
//
// a_t = exp(dt_t A) is one number per head (Mamba-2) or one per channel and state (Mamba-1). A tile of P channels and
// N lanes of the state stays in registers while the sequence goes by: nothing but inputs and outputs touches memory.
// All arrays are contiguous float32: x, y (batch, length, heads, headdim), dt (batch, length, heads), B, C (batch,
// length, groups, d_state), states (batch, heads, headdim, d_state); Mamba-1 is headdim 1. d_state is a multiple of 16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 64;  // one state in so many is kept for the backward pass
constexpr int SPAN = 4 * BLOCK;  // positions that all channels pass before any goes on: B and C of a span stay in the cache
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));

inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void add(float* p, Vec v) { store(p, load(p) + v); }

inline float sum(Vec v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

// Sums of P vectors; four at a time share their shuffles.
template <int P> inline void sums(const Vec* v, float* out) {
  if constexpr (P % 4 == 0) {
    for (int p = 0; p < P; p += 4) {
      Vec ab = __builtin_shufflevector(v[p], v[p + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(v[p], v[p + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
      Vec cd = __builtin_shufflevector(v[p + 2], v[p + 3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               __builtin_shufflevector(v[p + 2], v[p + 3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
      Vec all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
      all += __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
      all += __builtin_shufflevector(all, all, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
      for (int i = 0; i < 4; ++i) out[p + i] = all[i];
    }
  } else {
    for (int p = 0; p < P; ++p) out[p] = sum(v[p]);
  }
}

// exp, to 2 units in the last place; below -87 a number that is zero to every use.
inline Vec exp(Vec x) {
  x = x < -87.f ? x * 0 - 87.f : x;
  x = x > 88.f ? x * 0 + 88.f : x;
  Vec n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // nearest integer
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec e = r * 1.9875691500e-4f + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.f;
  return e * (Vec)((__builtin_convertvector(n, IVec) + 127) << 23);
}

struct Scan {
  int64_t batch, length, heads, headdim, groups, d_state;
  const float *x, *dt, *A, *B, *C, *D;
  const uint8_t* fresh;  // (batch, length): 1 where another sequence begins, or null

  int64_t rows() const { return heads * headdim; }
  int64_t blocks() const { return (length + BLOCK - 1) / BLOCK; }
};

// Where a tile stands: batch row b, channels [row, row + P), lanes [lane, lane + NV * LANES) of the state.
template <int P, int NV, bool SHARED> struct Tile {
  const Scan& s;
  int64_t b, row, lane, head, group;
  Vec A[P][NV];

  Tile(const Scan& scan, int64_t b, int64_t row, int64_t lane)
      : s(scan), b(b), row(row), lane(lane), head(row / scan.headdim), group(head / (scan.heads / scan.groups)) {
    if (!SHARED)
      for (int p = 0; p < P; ++p)
        for (int j = 0; j < NV; ++j) A[p][j] = load(s.A + (row + p) * s.d_state + lane + j * LANES);
  }
  int64_t at(int64_t t) const { return b * s.length + t; }
  int64_t of_group(int64_t t) const { return (at(t) * s.groups + group) * s.d_state + lane; }  // where B, C, dB, dC stand
  const float* B(int64_t t) const { return s.B + of_group(t); }
  const float* C(int64_t t) const { return s.C + of_group(t); }
  const float* x(int64_t t) const { return s.x + at(t) * s.rows() + row; }
  float dt(int64_t t, int p) const { return s.dt[at(t) * s.heads + (SHARED ? head : row + p)]; }
  int64_t state(int64_t p) const { return (b * s.rows() + row + p) * s.d_state + lane; }
  int64_t mark(int64_t k, int64_t p) const { return ((b * s.blocks() + k) * s.rows() + row + p) * s.d_state + lane; }

  void load_state(const float* from, Vec (&h)[P][NV]) const {
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < NV; ++j) h[p][j] = load(from + state(p) + j * LANES);
  }
  void store_state(float* to, const Vec (&h)[P][NV]) const {
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < NV; ++j) store(to + state(p) + j * LANES, h[p][j]);
  }

  // h <- a h + v B; with SHARED `shared` is a of the head, else `a` receives the decays
  void step(int64_t t, float shared, Vec (&h)[P][NV], Vec (*a)[NV]) const {
    bool fresh = s.fresh && s.fresh[at(t)];
    for (int p = 0; p < P; ++p) {
      float step = dt(t, p), v = step * x(t)[p];
      for (int j = 0; j < NV; ++j) {
        Vec in = v * load(B(t) + j * LANES);
        if (SHARED) {
          h[p][j] = h[p][j] * shared + in;
        } else {
          a[p][j] = fresh ? Vec{} : exp(step * A[p][j]);
          h[p][j] = h[p][j] * a[p][j] + in;
        }
      }
    }
  }
};

// exp(dt A) of one head at the positions of a span.
void decays(const Scan& s, int64_t b, int64_t head, int64_t first, int64_t last, float* out) {
  for (int64_t t = first; t < last; t += LANES, out += LANES) {
    Vec v{};
    int64_t count = std::min<int64_t>(LANES, last - t);
    for (int64_t i = 0; i < count; ++i) v[i] = s.dt[(b * s.length + t + i) * s.heads + head] * s.A[head];
    v = exp(v);
    for (int64_t i = 0; i < count; ++i) out[i] = s.fresh && s.fresh[b * s.length + t + i] ? 0.f : v[i];
  }
}

// Positions [first, last); `carry` is the state before them and becomes the state after them.
template <int P, int NV, bool SHARED>
void forward(const Tile<P, NV, SHARED>& tile, int64_t first, int64_t last, const float* shared, float* y, float* carry, float* marks) {
  const Scan& s = tile.s;
  Vec h[P][NV], a[P][NV];
  tile.load_state(carry, h);
  for (int64_t t = first; t < last; ++t) {
    if (marks && t % BLOCK == 0)
      for (int p = 0; p < P; ++p)
        for (int j = 0; j < NV; ++j) store(marks + tile.mark(t / BLOCK, p) + j * LANES, h[p][j]);
    tile.step(t, SHARED ? shared[t - first] : 0.f, h, a);
    Vec read[P];
    for (int p = 0; p < P; ++p) {
      read[p] = h[p][0] * load(tile.C(t));
      for (int j = 1; j < NV; ++j) read[p] += h[p][j] * load(tile.C(t) + j * LANES);
    }
    float out[P];
    sums<P>(read, out);
    float* to = y + tile.at(t) * s.rows() + tile.row;
    for (int p = 0; p < P; ++p) to[p] = out[p] + (tile.lane ? to[p] : s.D[SHARED ? tile.head : tile.row + p] * tile.x(t)[p]);
  }
  tile.store_state(carry, h);
}

struct Gradients {
  const float *y, *dy, *marks;
  float *dx, *ddt, *dA, *dB, *dC, *meets;  // dA: one per batch row; dB, dC: one per task
  float *h, *g;                            // the first state, and the gradient of the last one; g becomes that of the first
};

// Mamba-2. Forward in time: dC_t = sum of dy_t h_t.
template <int P, int NV>
void backward_C(const Tile<P, NV, true>& tile, int64_t first, int64_t last, const float* shared, const Gradients& to) {
  Vec h[P][NV], unused[P][NV];
  tile.load_state(to.h, h);
  for (int64_t t = first; t < last; ++t) {
    tile.step(t, shared[t - first], h, unused);
    const float* dy = to.dy + tile.at(t) * tile.s.rows() + tile.row;
    for (int j = 0; j < NV; ++j) {
      Vec sum_C = dy[0] * h[0][j];
      for (int p = 1; p < P; ++p) sum_C += dy[p] * h[p][j];
      add(to.dC + tile.of_group(t) + j * LANES, sum_C);
    }
  }
  tile.store_state(to.h, h);
}

// Mamba-2. Backward in time, g the gradient of the state: dB_t = sum of v_t g, dv_t = g B_t (left in dx), and at the
// block borders <h, g>, the gradient of the log decay that later blocks ask for.
template <int P, int NV>
void backward_B(const Tile<P, NV, true>& tile, int64_t first, int64_t last, const float* shared, const Gradients& to) {
  const Scan& s = tile.s;
  Vec g[P][NV];
  tile.load_state(to.g, g);
  for (int64_t t = last - 1; t >= first; --t) {
    const float* dy = to.dy + tile.at(t) * s.rows() + tile.row;
    float v[P], out[P];
    for (int p = 0; p < P; ++p) v[p] = tile.dt(t, p) * tile.x(t)[p];
    Vec dv[P]{};
    for (int j = 0; j < NV; ++j) {
      Vec B = load(tile.B(t) + j * LANES), C = load(tile.C(t) + j * LANES), sum_B{};
      for (int p = 0; p < P; ++p) {
        g[p][j] += dy[p] * C;
        sum_B += v[p] * g[p][j];
        dv[p] += g[p][j] * B;
        g[p][j] *= shared[t - first];
      }
      add(to.dB + tile.of_group(t) + j * LANES, sum_B);
    }
    sums<P>(dv, out);
    float* dx = to.dx + tile.at(t) * s.rows() + tile.row;
    for (int p = 0; p < P; ++p) dx[p] += out[p];
    if (t % BLOCK == 0 && t > 0) {
      Vec meets{};
      for (int p = 0; p < P; ++p)
        for (int j = 0; j < NV; ++j) meets += g[p][j] * load(to.marks + tile.mark(t / BLOCK, p) + j * LANES);
      to.meets[(tile.b * s.blocks() + t / BLOCK - 1) * s.heads + tile.head] += sum(meets);
    }
  }
  tile.store_state(to.g, g);
}

// Mamba-2. From dv to dx, ddt and dA of a head; dL/d(dt_u A) = sum over t >= u of (y_t dy_t - x_t dx_t), see ssd.py.
void backward_dt(const Scan& s, int64_t b, int64_t head, const Gradients& to) {
  double dA = 0;
  for (int64_t k = s.blocks() - 1; k >= 0; --k) {
    double passed = to.meets[(b * s.blocks() + k) * s.heads + head];
    for (int64_t t = std::min(s.length, (k + 1) * BLOCK) - 1; t >= k * BLOCK; --t) {
      int64_t at = (b * s.length + t) * s.heads + head;
      const float *x = s.x + at * s.headdim, *y = to.y + at * s.headdim, *dy = to.dy + at * s.headdim;
      float *dx = to.dx + at * s.headdim, dt = s.dt[at], D = s.D[head], direct = 0, seen = 0;
      for (int64_t p = 0; p < s.headdim; ++p) {
        direct += dx[p] * x[p];
        dx[p] = dx[p] * dt + D * dy[p];
        seen += y[p] * dy[p] - x[p] * dx[p];
      }
      passed += seen;
      to.ddt[at] = direct + float(passed) * s.A[head];
      dA += passed * dt;
    }
  }
  to.dA[b * s.heads + head] = float(dA);
}

// Mamba-1. The decay has a gradient for every channel and state, which needs the states: they are made again, a block
// at a time, from the kept ones.
template <int P, int NV> void backward_own(const Tile<P, NV, false>& tile, int64_t first_block, int64_t last_block, const Gradients& to) {
  const Scan& s = tile.s;
  const int64_t row = tile.row, lane = tile.lane;
  Vec g[P][NV], dA[P][NV];
  tile.load_state(to.g, g);
  tile.load_state(to.dA, dA);
  std::vector<Vec> before(BLOCK * P * NV), decay(BLOCK * P * NV);
  for (int64_t k = last_block - 1; k >= first_block; --k) {
    int64_t first = k * BLOCK, count = std::min<int64_t>(BLOCK, s.length - first);
    Vec h[P][NV], a[P][NV];
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < NV; ++j) h[p][j] = load(to.marks + tile.mark(k, p) + j * LANES);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&before[i * P * NV], h, sizeof h);
      tile.step(first + i, 0.f, h, a);
      std::memcpy(&decay[i * P * NV], a, sizeof a);
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      int64_t t = first + i;
      const float* dy = to.dy + tile.at(t) * s.rows() + row;
      Vec dv[P]{}, passed[P]{};
      for (int j = 0; j < NV; ++j) {
        Vec B = load(tile.B(t) + j * LANES), C = load(tile.C(t) + j * LANES), sum_B{}, sum_C{};
        for (int p = 0; p < P; ++p) {
          Vec was = before[(i * P + p) * NV + j];
          g[p][j] += dy[p] * C;
          sum_C += dy[p] * h[p][j];
          sum_B += (tile.dt(t, p) * tile.x(t)[p]) * g[p][j];
          dv[p] += g[p][j] * B;
          g[p][j] *= decay[(i * P + p) * NV + j];
          Vec pass = g[p][j] * was;  // dL/d(dt A)
          passed[p] += pass * tile.A[p][j];
          dA[p][j] += pass * tile.dt(t, p);
          h[p][j] = was;
        }
        add(to.dB + tile.of_group(t) + j * LANES, sum_B);
        add(to.dC + tile.of_group(t) + j * LANES, sum_C);
      }
      float out[P], through_decay[P];
      sums<P>(dv, out);
      sums<P>(passed, through_decay);
      float *dx = to.dx + tile.at(t) * s.rows() + row, *ddt = to.ddt + tile.at(t) * s.rows() + row;
      for (int p = 0; p < P; ++p) {
        dx[p] += out[p] * tile.dt(t, p) + (lane ? 0.f : s.D[row + p] * dy[p]);
        ddt[p] += out[p] * tile.x(t)[p] + through_decay[p];
      }
    }
  }
  tile.store_state(to.g, g);
  tile.store_state(to.dA, dA);
}

// Calls f.template operator()<P, NV>() with the tile that fits: 16 registers of state, P dividing `rows`, NV the lanes.
template <class F> void with_tile(int64_t rows, int64_t d_state, F f) {
  int64_t vectors = d_state / LANES;
  if (vectors % 4 == 0) {
    if (rows % 4 == 0) return f.template operator()<4, 4>();
    return f.template operator()<1, 4>();
  }
  if (vectors % 2 == 0) {
    if (rows % 8 == 0) return f.template operator()<8, 2>();
    if (rows % 4 == 0) return f.template operator()<4, 2>();
    return f.template operator()<1, 2>();
  }
  if (rows % 16 == 0) return f.template operator()<16, 1>();
  if (rows % 4 == 0) return f.template operator()<4, 1>();
  return f.template operator()<1, 1>();
}

// The channels of one part (a head of Mamba-2, P channels of Mamba-1), tile by tile.
template <int P, int NV, bool SHARED, class F> void for_tiles(const Scan& s, int64_t b, int64_t part, int64_t per_part, F f) {
  for (int64_t lane = 0; lane < s.d_state; lane += NV * LANES)
    for (int64_t row = part * per_part; row < (part + 1) * per_part; row += P) f(Tile<P, NV, SHARED>(s, b, row, lane));
}

template <bool SHARED> void scan_forward(const Scan& s, float* y, float* carry, float* marks, int splits, int threads) {
  with_tile(SHARED ? s.headdim : s.heads / s.groups, s.d_state, [&]<int P, int NV>() {
    int64_t per_part = SHARED ? s.headdim : P, parts = s.rows() / per_part;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t split = 0; split < splits; ++split)
        for (int64_t first = 0; first < s.length; first += SPAN) {
          int64_t last = std::min(s.length, first + SPAN);
          float shared[SPAN];
          for (int64_t part = parts * split / splits; part < parts * (split + 1) / splits; ++part) {
            if (SHARED) decays(s, b, part, first, last, shared);
            for_tiles<P, NV, SHARED>(s, b, part, per_part, [&](const auto& tile) { forward(tile, first, last, shared, y, carry, marks); });
          }
        }
  });
}

template <bool SHARED> void scan_backward(const Scan& s, const Gradients& to, int splits, int threads) {
  with_tile(SHARED ? s.headdim : s.heads / s.groups, s.d_state, [&]<int P, int NV>() {
    int64_t per_part = SHARED ? s.headdim : P, per_group = s.rows() / per_part / s.groups, spans = (s.length + SPAN - 1) / SPAN;
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t group = 0; group < s.groups; ++group)
        for (int64_t split = 0; split < splits; ++split) {  // each with its own dB and dC, to which all its channels add
          Gradients own = to;
          own.dB += split * s.batch * s.length * s.groups * s.d_state;
          own.dC += split * s.batch * s.length * s.groups * s.d_state;
          float shared[SPAN];
          int64_t first_part = group * per_group + per_group * split / splits, last_part = group * per_group + per_group * (split + 1) / splits;
          auto each = [&](int64_t first, int64_t last, auto f) {
            for (int64_t part = first_part; part < last_part; ++part) {
              if (SHARED) decays(s, b, part, first, last, shared);
              for_tiles<P, NV, SHARED>(s, b, part, per_part, f);
            }
          };
          if constexpr (SHARED)
            for (int64_t first = 0; first < s.length; first += SPAN) {
              int64_t last = std::min(s.length, first + SPAN);
              each(first, last, [&](const auto& tile) { backward_C(tile, first, last, shared, own); });
            }
          for (int64_t span = spans - 1; span >= 0; --span) {
            int64_t first = span * SPAN, last = std::min(s.length, first + SPAN);
            each(first, last, [&](const auto& tile) {
              if constexpr (SHARED) backward_B(tile, first, last, shared, own);
              else backward_own(tile, first / BLOCK, (last + BLOCK - 1) / BLOCK, own);
            });
          }
          if (SHARED)
            for (int64_t part = first_part; part < last_part; ++part) backward_dt(s, b, part, own);
        }
  });
}

// The convolution over the positions, and SiLU. x may be a part of wider rows; the output is cut into pieces.
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

inline Vec load_part(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  Vec v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store_part(float* p, Vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  std::memcpy(p, &v, count * sizeof(float));
}

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
          for (int64_t k = low; k < high; ++k) v += load_part(c.taps + k * c.channels + channel, count) * load_part(x + k * c.row_stride + channel, count);
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

// y = x W^T + bias for a few rows x (rows, in), W (out, in): one stream through W, at the speed of memory.
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

// shared: Mamba-2's decay. carry: the state before the first position, becomes the one after the last.
void llmrec_scan_forward(const Scan* s, int shared, float* y, float* carry, float* marks, int splits, int threads) {
  shared ? scan_forward<true>(*s, y, carry, marks, splits, threads) : scan_forward<false>(*s, y, carry, marks, splits, threads);
}

void llmrec_scan_backward(const Scan* s, int shared, const Gradients* to, int splits, int threads) {
  shared ? scan_backward<true>(*s, *to, splits, threads) : scan_backward<false>(*s, *to, splits, threads);
}

void llmrec_conv_forward(const Conv* c, float* const* y, int threads) { conv_forward(*c, y, threads); }

// dtaps: (batch, width + 1, channels)
void llmrec_conv_backward(const Conv* c, const float* const* dy, float* dx, float* dtaps, int threads) { conv_backward(*c, dy, dx, dtaps, threads); }

void llmrec_matvec(int64_t rows, int64_t in, int64_t out, const float* W, const float* x, const float* bias, float* y, int threads) {
  for (int64_t r = 0; r < rows;) {
    int64_t step = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
    auto run = step == 4 ? matvec<4> : step == 2 ? matvec<2> : matvec<1>;
    run(in, out, W, x + r * in, bias, y + r * out, threads);
    r += step;
  }
}
}
