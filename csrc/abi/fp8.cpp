// The C ABI of layers in FP8: checks every size that reaches address arithmetic (moestro.h says what is computed).
#include <mutex>

#include "abi/moestro.h"
#include "abi/table.h"

namespace {

constexpr int64_t LARGEST = int64_t(1) << 40;  // elements of one operand, as in dispatch.cpp

bool fits(int64_t a, int64_t b) { return a >= 0 && b >= 0 && (b == 0 || a <= LARGEST / b); }
bool sane(int threads) { return threads >= 1 && threads <= 1024; }

// Whether groups own slots in order, beginning with the first, and chosen rows exist.
bool fits_groups(const int64_t *bounds, int64_t num_groups, const int64_t *rows, int64_t num_slots, int64_t num_rows) {
    if (num_groups < 0 || num_groups > LARGEST || num_slots < 0 || num_slots > LARGEST || bounds[0] != 0) return false;
    for (int64_t g = 0; g < num_groups; g++)
        if (bounds[g + 1] < bounds[g]) return false;
    if (bounds[num_groups] > num_slots || (!rows && num_rows != num_slots)) return false;
    for (int64_t s = 0; rows && s < num_slots; s++)
        if (rows[s] < 0 || rows[s] >= num_rows) return false;
    return true;
}

}  // namespace

extern "C" {

int moestro_fp8_quantize(void *values, void *codes, float *scales, const void *x, const float *x_scales,
                         const int64_t *rows, const int64_t *bounds, const float *given, int64_t num_groups,
                         int64_t num_slots, int64_t num_rows, int64_t width, int tall, int wide, int e5m6,
                         int power_of_two, int type, int threads) {
    const Kernels *kernels = kernels_in_use();
    if (!kernels) return MOESTRO_NO_ISA;
    if (type != MOESTRO_FLOAT32 && type != MOESTRO_BFLOAT16) return MOESTRO_BAD_TYPE;
    if (!fits(num_slots, width) || !fits(num_rows, width) || !sane(threads) || (!tall && !wide) || (e5m6 && codes) ||
        !fits_groups(bounds, num_groups, rows, num_slots, num_rows))
        return MOESTRO_BAD_SIZE;
    return kernels->fp8_quantize(
        {static_cast<uint16_t *>(values), static_cast<uint8_t *>(codes), scales, x, x_scales, rows, bounds, given,
         num_groups, width, tall != 0, wide != 0, e5m6 != 0, power_of_two != 0},
        type, threads);
}

int moestro_fp8_widen(void *values, const void *codes, int64_t count, int threads) {
    const Kernels *kernels = kernels_in_use();
    if (!kernels) return MOESTRO_NO_ISA;
    if (!fits(count, 1) || !sane(threads)) return MOESTRO_BAD_SIZE;
    kernels->fp8_widen(static_cast<uint16_t *>(values), static_cast<const uint8_t *>(codes), count, threads);
    return MOESTRO_OK;
}

int moestro_fp8_rows(void *out, const void *a, const float *a_scales, const int64_t *rows, const void *const *b,
                     const void *const *b_scales, const int64_t *bounds, int64_t num_groups, int64_t num_slots,
                     int64_t num_rows, int64_t m, int64_t k, int back, int threads) {
    const Kernels *kernels = kernels_in_use();
    if (!kernels) return MOESTRO_NO_ISA;
    if (m < 0 || k < 0 || m > LARGEST || k > LARGEST || !fits(num_groups, m + 127) || !fits(m + 127, k + 127) ||
        !fits(num_groups * (m + 127), k + 127) || !sane(threads))
        return MOESTRO_BAD_SIZE;
    if (!fits(num_slots, m) || !fits(num_slots, k) || !fits(num_rows, back ? m : k) ||
        !fits_groups(bounds, num_groups, rows, num_slots, num_rows))
        return MOESTRO_BAD_SIZE;
    for (int64_t g = 0; m * k && g < num_groups; g++)
        if (bounds[g] < bounds[g + 1] && (!b[g] || !b_scales[g])) return MOESTRO_NO_ADDRESS;
    const std::lock_guard<std::mutex> lock(kernel_lock());
    return kernels->fp8_rows({static_cast<uint16_t *>(out), static_cast<const uint16_t *>(a), a_scales, rows, b,
                              b_scales, bounds, num_groups, m, k, back != 0},
                             threads);
}

int moestro_fp8_columns(float *out, const void *a, const float *a_scales, const void *b, const float *b_scales,
                        const int64_t *bounds, int64_t num_groups, int64_t num_slots, int64_t m, int64_t k,
                        int threads) {
    const Kernels *kernels = kernels_in_use();
    if (!kernels) return MOESTRO_NO_ISA;
    if (!fits(m, k) || !fits(num_groups, m * k) || !fits(num_slots, m) || !fits(num_slots, k + 127) ||
        !fits(num_groups, k + 127) || !sane(threads) || !fits_groups(bounds, num_groups, nullptr, num_slots, num_slots))
        return MOESTRO_BAD_SIZE;
    const std::lock_guard<std::mutex> lock(kernel_lock());
    return kernels->fp8_columns({out, static_cast<const uint16_t *>(a), a_scales, static_cast<const uint16_t *>(b),
                                 b_scales, bounds, num_groups, m, k},
                                threads);
}

int moestro_fp8_swiglu(void *out, const void *h, const float *weights, int64_t num_slots, int64_t width, int threads) {
    const Kernels *kernels = kernels_in_use();
    if (!kernels) return MOESTRO_NO_ISA;
    if (!fits(num_slots, width) || !fits(num_slots * width, 2) || !sane(threads)) return MOESTRO_BAD_SIZE;
    kernels->fp8_swiglu(static_cast<uint16_t *>(out), static_cast<const uint16_t *>(h), weights, num_slots, width,
                        threads);
    return MOESTRO_OK;
}

int moestro_fp8_swiglu_backward(void *act, void *dh, float *d_weights, const void *d_act, const void *h,
                                const float *h_scales, const float *weights, int64_t num_slots, int64_t width,
                                int threads) {
    const Kernels *kernels = kernels_in_use();
    if (!kernels) return MOESTRO_NO_ISA;
    if (!fits(num_slots, width) || !fits(num_slots * width, 2) || !sane(threads)) return MOESTRO_BAD_SIZE;
    return kernels->fp8_swiglu_backward(
        {static_cast<uint16_t *>(act), static_cast<uint16_t *>(dh), d_weights, static_cast<const uint16_t *>(d_act),
         static_cast<const uint8_t *>(h), h_scales, weights, num_slots, width},
        threads);
}
}
