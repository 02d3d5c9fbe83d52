// The loop of asr_downstream/far/model/ops/lstm.h without torch, over many sizes, against sums in double precision.
// Buffers are of exactly the size that is needed, so that AddressSanitizer sees whatever goes beyond one.
//
//     c++ -std=c++20 -O1 -g -fsanitize=address,undefined -march=native -I asr_downstream/far/model/ops tests/far/lstm_driver.cpp
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "lstm.h"

struct Half {  // a type of two bytes: the upper half of a float
  uint16_t bits = 0;
  Half() = default;
  explicit Half(float value) {
    uint32_t all;
    std::memcpy(&all, &value, 4);
    bits = static_cast<uint16_t>((all + 0x8000u) >> 16);
  }
  explicit operator float() const {
    const uint32_t all = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &all, 4);
    return value;
  }
};

static std::mt19937 random_numbers(0);

template <typename T>
static std::vector<T> draw(int64_t count, float bound) {
  std::uniform_real_distribution<float> numbers(-bound, bound);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(numbers(random_numbers));
  values.shrink_to_fit();
  return values;
}

template <typename T>
static double number(const T& value) {
  return static_cast<float>(value);
}

static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Largest difference of one direction over ``count`` sequences.
template <typename T>
static double difference(int64_t width, int64_t inputs, int64_t count, int64_t length, bool reverse) {
  const std::vector<T> ih = draw<T>(4 * width * inputs, 0.3f), hh = draw<T>(4 * width * width, 0.3f);
  const std::vector<T> bi = draw<T>(4 * width, 1.f), bh = draw<T>(4 * width, 1.f);
  const std::vector<T> x = draw<T>(count * length * inputs, 2.f);
  std::vector<T> out(count * length * width);
  const asr_lstm::Direction<T> direction{ih.data(), hh.data(), bi.data(), bh.data(), width, inputs, reverse};
  asr_lstm::Workspace space(direction.groups(), width, inputs);
  asr_lstm::pack(direction, space);
  asr_lstm::run(direction, space, x.data(), length * inputs, inputs, count, length, out.data(), length * width, width);
  double most = 0;
  for (int64_t b = 0; b < count; b++) {
    std::vector<double> h(width, 0), c(width, 0), sums(4 * width);
    for (int64_t n = 0; n < length; n++) {
      const int64_t at = b * length + (reverse ? length - 1 - n : n);
      for (int64_t row = 0; row < 4 * width; row++) {
        sums[row] = number(bi[row]) + number(bh[row]);
        for (int64_t k = 0; k < inputs; k++) sums[row] += number(ih[row * inputs + k]) * number(x[at * inputs + k]);
        for (int64_t k = 0; k < width; k++) sums[row] += number(hh[row * width + k]) * h[k];
      }
      for (int64_t j = 0; j < width; j++) {
        c[j] = sigmoid(sums[width + j]) * c[j] + sigmoid(sums[j]) * std::tanh(sums[2 * width + j]);
        h[j] = sigmoid(sums[3 * width + j]) * std::tanh(c[j]);
        most = std::max(most, std::abs(h[j] - number(out[at * width + j])));
      }
    }
  }
  return most;
}

int main() {
  double whole = 0, half = 0;
  int64_t tried = 0;
  for (int64_t width : {1, 3, 4, 7, 8, 9, 16, 17, 27, 33, 64})
    for (int64_t inputs : {1, 5, 8, 31, 64})
      for (int64_t count = 1; count <= asr_lstm::BLOCK; count += 1 + tried % 3, tried++) {
        const int64_t length = 1 + random_numbers() % 60;
        whole = std::max(whole, difference<float>(width, inputs, count, length, tried % 2));
        half = std::max(half, difference<Half>(width, inputs, count, length % 9 + 1, tried % 2));
      }
  std::printf("%lld sizes in vectors of %lld, differences %.1e and %.1e\n", static_cast<long long>(tried),
              static_cast<long long>(asr_lstm::LANES), whole, half);
  return whole < 2e-6 && half < 2e-2 ? 0 : 1;
}
