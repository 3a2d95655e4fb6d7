// The kernels of layers in FP8, for check.cpp, which includes this after its random vectors and matrices.
#pragma once

namespace {

// Codes of every kind and direction, then the three products and SwiGLU, of groups with these loads.
inline int check_fp8(int64_t num_rows, int64_t m, int64_t k, std::vector<int64_t> loads) {
    const int64_t groups = int64_t(loads.size()), across = (k + 127) / 128, up = (m + 127) / 128;
    std::vector<int64_t> bounds{0};
    for (int64_t load : loads) bounds.push_back(bounds.back() + load);
    const int64_t slots = bounds.back() + 1, tiles = slots / 128 + groups;  // one slot belongs to nobody
    std::vector<int64_t> rows(slots), whole{0, num_rows};
    for (int64_t s = 0; s < slots; s++) rows[s] = s * 7 % num_rows;
    const auto x = random_vector<float>(num_rows * k);
    std::vector<uint8_t> codes(num_rows * k);
    std::vector<uint16_t> values(num_rows * k), turned(slots * k), dy(slots * m), dx(slots * k), out(slots * m);
    std::vector<float> scales(num_rows * across), turned_scales(tiles * k), by_row(slots * up, 0.5f),
        by_column(tiles * m, 0.5f), sums(groups * m * k);
    int bad = moestro_fp8_quantize(values.data(), codes.data(), scales.data(), x.data(), nullptr, nullptr, whole.data(),
                                   nullptr, 1, num_rows, num_rows, k, 0, 1, 0, 0, MOESTRO_FLOAT32, 2);
    bad |= moestro_fp8_quantize(turned.data(), nullptr, turned_scales.data(), codes.data(), scales.data(), rows.data(),
                                bounds.data(), nullptr, groups, slots, num_rows, k, 1, 0, 0, 1, MOESTRO_FLOAT32, 2);
    std::vector<float> square(tiles * across), given(groups, 2.0f);
    bad |=
        moestro_fp8_quantize(turned.data(), nullptr, square.data(), values.data(), nullptr, rows.data(), bounds.data(),
                             given.data(), groups, slots, num_rows, k, 1, 1, 1, 1, MOESTRO_BFLOAT16, 2);
    bad |= moestro_fp8_widen(values.data(), codes.data(), num_rows * k, 2);
    std::fill(dy.begin(), dy.end(), uint16_t(0x3f80));
    Matrices<uint16_t> b(groups, m * k);
    Matrices<float> b_scales(groups, up * across);
    bad |= moestro_fp8_rows(out.data(), values.data(), scales.data(), rows.data(), b.addresses.data(),
                            b_scales.addresses.data(), bounds.data(), groups, slots, num_rows, m, k, 0, 2);
    bad |= moestro_fp8_rows(dx.data(), dy.data(), by_row.data(), nullptr, b.addresses.data(), b_scales.addresses.data(),
                            bounds.data(), groups, slots, slots, m, k, 1, 2);
    bad |= moestro_fp8_columns(sums.data(), dy.data(), by_column.data(), turned.data(), turned_scales.data(),
                               bounds.data(), groups, slots, m, k, 2);
    const int64_t width = k / 2;  // of SwiGLU on rows [num_rows, 2 · width]
    std::vector<uint16_t> act(num_rows * width), dh(num_rows * 2 * width);
    std::vector<uint8_t> h(num_rows * 2 * width, 0x38);
    std::vector<float> h_scales(num_rows * ((2 * width + 127) / 128), 1.0f), ones(num_rows, 1.0f), d(num_rows);
    bad |= moestro_fp8_swiglu(act.data(), dh.data(), ones.data(), num_rows, width, 2);
    bad |= moestro_fp8_swiglu_backward(act.data(), dh.data(), d.data(), act.data(), h.data(), h_scales.data(),
                                       ones.data(), num_rows, width, 2);
    rows[0] = num_rows;
    return bad | (moestro_fp8_rows(out.data(), values.data(), scales.data(), rows.data(), b.addresses.data(),
                                   b_scales.addresses.data(), bounds.data(), groups, slots, num_rows, m, k, 0,
                                   2) != MOESTRO_BAD_SIZE);
}

}  // namespace
