// The scans of Mamba-1 and Mamba-2.
//
//   h_t = a_t h_{t-1} + v_t B_t,   y_t = h_t C_t + D x_t,   v = dt x
//
// a_t = exp(dt_t A) is one number per head (Mamba-2) or one per channel and state (Mamba-1). A tile of P channels and
// N lanes of the state stays in registers while the sequence goes by: nothing but inputs and outputs touches memory.
// All arrays are contiguous float32: x, y (batch, length, heads, headdim), dt (batch, length, heads), B, C (batch,
// length, groups, d_state), states (batch, heads, headdim, d_state); Mamba-1 is headdim 1. d_state is a multiple of 16.

#include "vectors.h"

namespace {

constexpr int BLOCK = 64;  // one state in so many is kept for the backward pass
constexpr int SPAN = 4 * BLOCK;  // positions that all channels pass before any goes on: B and C of a span stay in the cache

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
          int64_t first_part = group * per_group + per_group * split / splits;
          int64_t last_part = group * per_group + per_group * (split + 1) / splits;
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

}  // namespace

extern "C" {

// shared: Mamba-2's decay. carry: the state before the first position, becomes the one after the last.
void llmrec_scan_forward(const Scan* s, int shared, float* y, float* carry, float* marks, int splits, int threads) {
  shared ? scan_forward<true>(*s, y, carry, marks, splits, threads) : scan_forward<false>(*s, y, carry, marks, splits, threads);
}

void llmrec_scan_backward(const Scan* s, int shared, const Gradients* to, int splits, int threads) {
  shared ? scan_backward<true>(*s, *to, splits, threads) : scan_backward<false>(*s, *to, splits, threads);
}
}
