// Distances, the check for cancellation and the profile of a tile in one pass.
//
// Plain loops without intrinsics: a compiler vectorises them for whatever machine it is
// on. What they compute, and why, stands in distance.py and stationary.py, which hold
// for every tile that is not computed here. No number here is infinite or NaN (the first
// thing that is checked), so the compiler may assume that none ever is.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kColumns = 512;  // at a time: with ``Columns``, 24 KB, they stay in the first cache
constexpr int64_t kMost = 10;  // dimensions of points, MOST_DIMENSIONS of fused.py
constexpr float kTiny = 1e-30f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2E = 1.442695040888963f;
constexpr float kLargest = 1e37f;  // square of a point: four times as much is finite

// 2^-u for u >= 0, relative error 2e-7; zero where a float is below 2^-126.
inline float power(float u) {
  const float x = u > 127.0f ? 127.0f : u;
  const int32_t whole = static_cast<int32_t>(x + 0.5f);
  const float rest = static_cast<float>(whole) - x;
  float p = 1.535336188319500e-4f;
  p = p * rest + 1.339887440266574e-3f;
  p = p * rest + 9.618437357674640e-3f;
  p = p * rest + 5.550332471162809e-2f;
  p = p * rest + 2.402264791363012e-1f;
  p = p * rest + 6.931472028550421e-1f;
  p = p * rest + 1.0f;
  const int32_t bits = (127 - whole) << 23;  // of 2^-whole
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

inline float root(float d2) { return __builtin_sqrtf(d2 < kTiny ? kTiny : d2); }

struct RBF {
  static float at(float d2) { return power(d2 < 0.0f ? 0.0f : d2); }
};

struct Matern12 {
  static float at(float d2) { return power(root(d2)); }
};

struct Matern32 {
  static float at(float d2) {
    const float u = root(d2);
    return power(u) * (1.0f + kLn2 * u);
  }
};

struct Matern52 {
  static float at(float d2) {
    const float u = root(d2);
    return power(u) * ((u + 3.0f * kLog2E) * u + 3.0f * kLog2E * kLog2E);
  }
};

struct Tile {
  int64_t rows, columns, width;  // width: of both forms
  const float *left, *right;
  float* out;
  int64_t stride;  // of the rows of out
  float level;     // see distance.py: squared distances below it have cancelled
};

// By bits: to a compiler that was told so, every number is finite.
bool is_moderate(float square) {
  int32_t bits, largest;
  std::memcpy(&bits, &square, sizeof bits);
  std::memcpy(&largest, &kLargest, sizeof largest);
  return (bits & 0x7fffffff) < largest;
}

bool has_moderate_squares(const float* z, int64_t n, int64_t width) {
  bool all = true;
  for (int64_t i = 0; i < n; i++) {
    float sum = 0.0f;
    for (int64_t q = 0; q < width; q++) sum += z[i * width + q] * z[i * width + q];
    all &= is_moderate(sum);
  }
  return all;
}

// Columns of a tile, by dimension, and what their squares allow.
struct alignas(64) Columns {
  float z[kMost][kColumns], square[kColumns], bound[kColumns];
  int64_t count;
};

// Squared distances of a row by D products each, unless D is zero and they are there.
// Whether one of them has cancelled.
template <int D>
int32_t distances(const Columns& c, const float* point, float square, float bound,
                  float* __restrict row) {
  int32_t near = 0;
  for (int64_t j = 0; j < c.count; j++) {
    if (D > 0) {
      float d2 = square + c.square[j];
      for (int q = 0; q < D; q++) d2 += point[q] * c.z[q][j];
      row[j] = d2;
    }
    near |= row[j] <= bound + c.bound[j];
  }
  return near;
}

using Distances = int32_t (*)(const Columns&, const float*, float, float, float*);
constexpr Distances kDistances[kMost + 1] = {
    distances<0>, nullptr,      nullptr,      nullptr,      distances<4>, distances<5>,
    distances<6>, distances<7>, distances<8>, distances<9>, distances<10>};

// Forms are [z, |z|^2, 1] and [-2 z, 1, |z|^2]. With more than kMost dimensions their
// product is in out.
template <class Profile>
void from_products(const Tile& t) {
  const int64_t d = t.width - 2, made = d <= kMost ? d : 0;
  Columns c;
  for (int64_t start = 0; start < t.columns; start += kColumns) {
    c.count = t.columns - start < kColumns ? t.columns - start : kColumns;
    const float* right = t.right + start * t.width;
    for (int64_t j = 0; j < c.count; j++) {
      const float* form = right + j * t.width;
      for (int64_t q = 0; q < made; q++) c.z[q][j] = form[q];
      c.square[j] = form[d + 1];
      c.bound[j] = t.level * form[d + 1];
    }
    for (int64_t i = 0; i < t.rows; i++) {
      const float* point = t.left + i * t.width;
      const float bound = t.level * point[d];
      float* __restrict row = t.out + i * t.stride + start;
      const int32_t near = kDistances[made](c, point, point[d], bound, row);
      for (int64_t j = 0; near && j < c.count; j++) {
        if (row[j] > bound + c.bound[j]) continue;
        float sum = 0.0f;
        for (int64_t q = 0; q < d; q++) {
          const float difference = point[q] + 0.5f * right[j * t.width + q];
          sum += difference * difference;
        }
        row[j] = sum;
      }
      for (int64_t j = 0; j < c.count; j++) row[j] = Profile::at(row[j]);
    }
  }
}

// Forms are the points themselves, of D dimensions.
template <class Profile, int D>
void from_differences(const Tile& t) {
  float z[D][kColumns];
  for (int64_t start = 0; start < t.columns; start += kColumns) {
    const int64_t m = t.columns - start < kColumns ? t.columns - start : kColumns;
    for (int64_t j = 0; j < m; j++)
      for (int q = 0; q < D; q++) z[q][j] = t.right[(start + j) * D + q];
    for (int64_t i = 0; i < t.rows; i++) {
      const float* point = t.left + i * D;
      float* __restrict row = t.out + i * t.stride + start;
      for (int64_t j = 0; j < m; j++) {
        float d2 = 0.0f;
        for (int q = 0; q < D; q++) {
          const float difference = point[q] - z[q][j];
          d2 += difference * difference;
        }
        row[j] = Profile::at(d2);
      }
    }
  }
}

template <class Profile>
void write(const Tile& t) {
  switch (t.width) {
    case 1: return from_differences<Profile, 1>(t);
    case 2: return from_differences<Profile, 2>(t);
    case 3: return from_differences<Profile, 3>(t);
    default: return from_products<Profile>(t);
  }
}

}  // namespace

// Whether the tile was written: not where a square is not finite, or nearly so.
extern "C" int sgdgp_tile(int profile, int64_t rows, int64_t columns, int64_t width,
                          const float* left, const float* right, float* out,
                          int64_t stride, float level) {
  if (!has_moderate_squares(left, rows, width)) return 0;
  if (!has_moderate_squares(right, columns, width)) return 0;
  const Tile tile{rows, columns, width, left, right, out, stride, level};
  switch (profile) {
    case 0: write<RBF>(tile); return 1;
    case 1: write<Matern12>(tile); return 1;
    case 2: write<Matern32>(tile); return 1;
    case 3: write<Matern52>(tile); return 1;
    default: return 0;
  }
}
