// Everything of one instruction set; included by each kernels_*.cpp after it has defined `Isa` and named `KERNELS`.
#pragma once
#include "serving/attention.h"
#include "serving/fp8_rows.h"
#include "training/experts.h"
#include "training/head.h"
#include "training/flash_backward.h"
#include "serving/pack.h"
#include "serving/packed.h"
#include "math/rows.h"
#include "serving/serve_rows.h"
#include "abi/table.h"
#include "training/train_rows.h"
#include "training/fp8.h"

// What dispatch.cpp calls, one set of these per instruction set.

extern const Kernels KERNELS = {
    [](void *out, const void *a, const void *b, const MatmulSizes &s, int type, int out_type, int threads) {
        auto run = [&](auto *element, auto *result) {
            using T = std::remove_pointer_t<decltype(element)>;
            using Out = std::remove_pointer_t<decltype(result)>;
            return matmul(static_cast<Out *>(out), static_cast<const T *>(a), static_cast<const T *>(b), s, threads);
        };
        float *f = nullptr;
        uint16_t *h = nullptr;
        if (type == MOESTRO_FLOAT32) return out_type == MOESTRO_FLOAT32 ? run(f, f) : run(f, h);
        return out_type == MOESTRO_FLOAT32 ? run(h, f) : run(h, h);
    },
    [](const ExpertsForward &p, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? experts_forward<float>(p, threads) : experts_forward<uint16_t>(p, threads);
    },
    [](const ExpertsBackward &p, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? experts_backward<float>(p, threads) : experts_backward<uint16_t>(p, threads);
    },
    [](void *out, const void *y, const int64_t *slot, int64_t num_tokens, int64_t top_k, int64_t num_slots,
       int64_t hidden, int type, int threads) {
        if (type == MOESTRO_FLOAT32)
            combine(static_cast<float *>(out), static_cast<const float *>(y), slot, num_tokens, top_k, num_slots,
                    hidden, threads);
        else
            combine(static_cast<uint16_t *>(out), static_cast<const uint16_t *>(y), slot, num_tokens, top_k, num_slots,
                    hidden, threads);
    },
    [](char *panels, const void *x, int64_t m, int64_t k, int kind, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? pack_panels(panels, static_cast<const float *>(x), m, k, kind, threads)
                                       : pack_panels(panels, static_cast<const uint16_t *>(x), m, k, kind, threads);
    },
    pack_codes,
    [](const PackedLinear &p, int kind, int type, int threads) {
        return with_product(kind, type, [&](auto product, auto element) {
            return packed_linear<decltype(product), decltype(element)>(p, threads);
        });
    },
    [](const PackedExperts &p, int kind, int type, int threads) {
        return with_product(kind, type, [&](auto product, auto element) {
            return packed_experts<decltype(product), decltype(element)>(p, threads);
        });
    },
    [](const PagedAttention &p, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? paged_attention<float>(p, threads) : paged_attention<uint16_t>(p, threads);
    },
    [](const Fp8CacheRows &p, int type, int threads) {
        type == MOESTRO_FLOAT32 ? store_fp8_rows<float>(p, threads) : store_fp8_rows<uint16_t>(p, threads);
    },
    [](void *out, const void *x, const void *weight, int64_t rows, int64_t width, float eps, int type, int weight_type,
       int threads) {
        const auto run = [&](auto element, auto of_weight) {
            using T = decltype(element);
            using W = decltype(of_weight);
            rms_norm(static_cast<T *>(out), static_cast<const T *>(x), static_cast<const W *>(weight), rows, width, eps,
                     threads);
        };
        const bool wide = weight_type == MOESTRO_FLOAT32;
        if (type == MOESTRO_FLOAT32) return wide ? run(float(), float()) : run(float(), uint16_t());
        return wide ? run(uint16_t(), float()) : run(uint16_t(), uint16_t());
    },
    [](void *out, const void *gate_up, int64_t rows, int64_t width, int type, int threads) {
        if (type == MOESTRO_FLOAT32)
            return swiglu(static_cast<float *>(out), static_cast<const float *>(gate_up), rows, width, threads);
        swiglu(static_cast<uint16_t *>(out), static_cast<const uint16_t *>(gate_up), rows, width, threads);
    },
    [](int64_t rounds, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? multiply_in_registers<float>(rounds, threads)
                                       : multiply_in_registers<uint16_t>(rounds, threads);
    },
    [](const CrossEntropy &p, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? cross_entropy<float>(p, threads) : cross_entropy<uint16_t>(p, threads);
    },
    [](const Rope &p, int type, int threads) {
        type == MOESTRO_FLOAT32 ? rope<float>(p, threads) : rope<uint16_t>(p, threads);
    },
    [](const Route &p, int threads) { return route(p, threads); },
    [](void *out, const void *a, const void *b, int64_t rows, int64_t width, int type, int threads) {
        if (type == MOESTRO_FLOAT32)
            return add(static_cast<float *>(out), static_cast<const float *>(a), static_cast<const float *>(b), rows,
                       width, threads);
        add(static_cast<uint16_t *>(out), static_cast<const uint16_t *>(a), static_cast<const uint16_t *>(b), rows,
            width, threads);
    },
    [](const FlashForward &p, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? flash_forward<float>(p, threads) : flash_forward<uint16_t>(p, threads);
    },
    [](const FlashBackward &p, int type, int threads) {
        return type == MOESTRO_FLOAT32 ? flash_backward<float>(p, threads) : flash_backward<uint16_t>(p, threads);
    },
    [](const NormBackward &p, int type, int weight_type, int threads) {
        const bool wide = weight_type == MOESTRO_FLOAT32;
        if (type == MOESTRO_FLOAT32)
            return wide ? rms_norm_backward<float, float>(p, threads) : rms_norm_backward<float, uint16_t>(p, threads);
        return wide ? rms_norm_backward<uint16_t, float>(p, threads)
                    : rms_norm_backward<uint16_t, uint16_t>(p, threads);
    },
    [](void *d_gate_up, const void *dy, const void *gate_up, int64_t rows, int64_t width, int type, int threads) {
        if (type == MOESTRO_FLOAT32)
            return swiglu_gradient(static_cast<float *>(d_gate_up), static_cast<const float *>(dy),
                                   static_cast<const float *>(gate_up), rows, width, threads);
        swiglu_gradient(static_cast<uint16_t *>(d_gate_up), static_cast<const uint16_t *>(dy),
                        static_cast<const uint16_t *>(gate_up), rows, width, threads);
    },
    [](const JoinHeads &p, int type, int threads) {
        type == MOESTRO_FLOAT32 ? join_heads<float>(p, threads) : join_heads<uint16_t>(p, threads);
    },
    [](const SplitHeads &p, int type, int threads) {
        type == MOESTRO_FLOAT32 ? split_heads<float>(p, threads) : split_heads<uint16_t>(p, threads);
    },
    [](const Fp8Quantize &p, int type, int threads) { return fp8_quantize(p, type, threads); },
    [](uint16_t *values, const uint8_t *codes, int64_t count, int threads) {
        fp8_widen(values, codes, count, threads);
    },
    [](const Fp8Rows &p, int threads) { return fp8_rows(p, threads); },
    [](const Fp8Columns &p, int threads) { return fp8_columns(p, threads); },
    [](uint16_t *out, const uint16_t *h, const float *weights, int64_t rows, int64_t width, int threads) {
        fp8_swiglu(out, h, weights, rows, width, threads);
    },
    [](const Fp8Swiglu &p, int threads) { return fp8_swiglu_backward(p, threads); },
};
