// An MLP without skipping, in two halves: the hidden activations of 128 neurons, and some columns of the output. Few
// tokens multiply tiles as they are, many packed blocks.

// out[m][n] = token m . row first + n of gate or up, for 128 rows: of rows in records, or else of tiles.
template <class W, int digits>
void multiply_rows(const Weights& w, const Matrix* a, const Tiles& tiles, std::size_t first, const Tokens& left,
                   float* out) {
    const std::size_t count = w.ffn - first < block ? w.ffn - first : block;
    if (a == nullptr && left.rows <= max_unpacked_rows) {
        multiply_tiles<W, digits>(tiles, first / tile_rows, (count + tile_rows - 1) / tile_rows, left, out, block);
    } else if constexpr (digits == 1) {
        Packed packed;
        const std::size_t last = (w.ffn + tile_rows - 1) / tile_rows;
        multiply_blocks<W>(
            left, w.columns / block, count, packed,
            [&](std::size_t n, std::size_t b) {
                if (a == nullptr) {
                    pack_tiles<W>(tiles, (first + n) / tile_rows, last, b, packed);
                } else {
                    pack_rows<W>(*a, first + n, w.ffn, b, packed);
                }
            },
            out);
    }
}

template <class W, int digits>
void hidden_of(const Weights& w, const Thresholds& thresholds, const Tokens& t, std::size_t first, Tokens& hidden,
               float* scratch) {
    float *g = scratch, *up = g + t.rows * block;
    multiply_rows<W, digits>(w, nullptr, w.gate_tiles, first, t, g);
    multiply_rows<W, digits>(w, w.is_tiled ? nullptr : &w.up, w.up_tiles, first, t, up);
    activate(w.activation, g, t.rows * block);
    const std::size_t count = w.ffn - first < block ? w.ffn - first : block;
    for (std::size_t m = 0; m < t.rows; ++m) {
        float values[block] = {};
        for (std::size_t j = 0; j < count; ++j) {
            const float limit = threshold_of(thresholds, first + j), a = g[m * block + j];
            values[j] = a <= limit && a >= -limit ? 0.0f : a * up[m * block + j];
        }
        put_block<W>(values, digits, first / block * t.rows + m, hidden);
    }
}

template <class W, int digits>
void output_of(const Weights& w, const Tokens& left, std::size_t begin, std::size_t end, float* y, float* sums) {
    const std::size_t last = w.hidden < end ? w.hidden : end;
    if (w.is_tiled && left.rows <= max_unpacked_rows) {
        const std::size_t tiles = (last - begin + tile_rows - 1) / tile_rows;
        multiply_tiles<W, digits>(w.down_tiles, begin / tile_rows, tiles, left, sums, block);
    } else if constexpr (digits == 1) {
        Packed packed;
        const std::size_t tiles = (w.hidden + tile_rows - 1) / tile_rows;
        multiply_blocks<W>(
            left, (w.ffn + block - 1) / block, last - begin, packed,
            [&](std::size_t n, std::size_t b) {
                if (w.is_tiled) {
                    pack_tiles<W>(w.down_tiles, (begin + n) / tile_rows, tiles, b, packed);
                } else {
                    pack_down<W>(w, b * block, begin + n, packed);
                }
            },
            sums);
    }
    for (std::size_t m = 0; m < left.rows; ++m) {
        for (std::size_t n = 0; n < last - begin; n += lanes) {
            const std::size_t rest = last - begin - n;
            f_store(y + m * w.hidden + begin + n, f_load(sums + m * block + n), rest < lanes ? rest : lanes);
        }
    }
}

template <class W>
void hidden_of_format(const Weights& w, const Thresholds& thresholds, const Tokens& t, int digits, std::size_t first,
                      Tokens& hidden, float* scratch) {
    (digits == 0   ? hidden_of<W, 0>
     : digits == 1 ? hidden_of<W, 1>
                   : hidden_of<W, 2>)(w, thresholds, t, first, hidden, scratch);
}

void compute_hidden(const Weights& w, const Thresholds& thresholds, const Tokens& t, int digits, std::size_t first,
                    Tokens& hidden, float* scratch) {
    if (w.format == Format::bf16) {
        hidden_of<BF16, 0>(w, thresholds, t, first, hidden, scratch);
    } else {
        (w.format == Format::u4 ? hidden_of_format<U4> : hidden_of_format<I8>)(w, thresholds, t, digits, first, hidden,
                                                                               scratch);
    }
}

template <class W>
void output_of_format(const Weights& w, const Tokens& left, int digits, std::size_t begin, std::size_t end, float* y,
                      float* scratch) {
    (digits == 0 ? output_of<W, 0> : digits == 1 ? output_of<W, 1> : output_of<W, 2>)(w, left, begin, end, y, scratch);
}

void compute_output(const Weights& w, const Tokens& left, int digits, std::size_t begin, std::size_t end, float* y,
                    float* scratch) {
    if (w.format == Format::bf16) {
        output_of<BF16, 0>(w, left, begin, end, y, scratch);
    } else {
        (w.format == Format::u4 ? output_of_format<U4> : output_of_format<I8>)(w, left, digits, begin, end, y, scratch);
    }
}
