// The weights' blob: what its header says, where its sections lie, and how much scratch the kernels need.

#include <cstring>

#include "cats_mlp/cats_mlp.hpp"

namespace edge {
namespace cats_mlp {
namespace {

// The first 64 bytes of a blob, little endian.
struct Header {
    char magic[8];
    std::uint32_t version;
    std::uint32_t format;
    std::uint32_t activation;
    std::uint32_t hidden;
    std::uint32_t ffn;
    std::uint32_t layout;  // 0: records, 1: tiles
    std::uint64_t size;    // of the blob
    std::uint8_t zeros[20];
    std::uint32_t crc;  // CRC-32 of the 60 bytes before
};
static_assert(sizeof(Header) == 64, "the blob's header has 64 bytes");
static_assert(sizeof(std::size_t) == 8, "the sizes that a header may state overflow 32 bits");

constexpr char magic[9] = "EDGE-MLP";
constexpr std::uint32_t version = 2;
constexpr std::size_t record_padding = 64;  // else the rows of a batch would share a few sets of the caches

std::uint32_t crc32(const std::uint8_t* data, std::size_t size) {
    std::uint32_t crc = 0xFFFFFFFFu;
    for (std::size_t i = 0; i < size; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) {
            crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
        }
    }
    return ~crc;
}

std::size_t round_up(std::size_t size, std::size_t step) { return (size + step - 1) / step * step; }

const char* check(const Header& header, const std::uint8_t* blob, std::size_t size) {
    if (std::memcmp(header.magic, magic, 8) != 0) {
        return "they do not begin with EDGE-MLP";
    }
    if (header.crc != crc32(blob, sizeof(Header) - sizeof(std::uint32_t))) {
        return "their header is damaged";
    }
    if (header.version != version) {
        return "they have another version than 2; export the model again";
    }
    if (header.format > 2 || header.activation > 2 || header.layout > 1) {
        return "their format, activation or layout is unknown; export the model again";
    }
    if (header.hidden == 0 || header.ffn == 0 || header.hidden > max_columns || header.ffn > (1u << 24)) {
        return "their sizes are out of range";
    }
    if (header.format == 1 && (header.hidden % block != 0 || header.ffn % block != 0)) {
        return "their sizes are no multiples of 128, as 4 bits need";
    }
    return header.size == size ? nullptr : "they have another size than their header says";
}

// Hands out sections one after another.
class Sections {
public:
    explicit Sections(const std::uint8_t* blob) : m_blob(blob) {}

    template <class T>
    const T* take(std::size_t count) {
        const std::uint8_t* section = m_blob + m_end;
        m_end += round_up(count * sizeof(T), 64);
        return reinterpret_cast<const T*>(section);
    }

    std::size_t end() const { return m_end; }

private:
    const std::uint8_t* m_blob;
    std::size_t m_end = sizeof(Header);
};

// Groups of columns that share a scale.
std::size_t groups_of(Format format, std::size_t columns) {
    return format == Format::i8 ? 1 : format == Format::u4 ? columns / block : 0;
}

struct TilesShape {
    Tiles* tiles;
    std::size_t rows, columns;
};

void take_tiles(Sections& sections, const Weights& w, const TilesShape& shape) {
    shape.tiles->blocks = round_up(shape.columns, block) / block;
    shape.tiles->groups = groups_of(w.format, shape.columns);
    const std::size_t row_bytes = shape.tiles->blocks * (w.row_bytes / (w.columns / block));
    shape.tiles->bytes = sections.take<std::uint8_t>(round_up(shape.rows, tile_rows) * row_bytes);
}

void take_scales(Sections& sections, const TilesShape& shape) {
    const std::size_t count = round_up(shape.rows, tile_rows) * shape.tiles->groups;
    shape.tiles->scale = sections.take<std::uint16_t>(count);
    shape.tiles->zero = sections.take<std::int8_t>(count);
}

void take_records(Sections& sections, Weights& w) {
    const TilesShape gate{&w.gate_tiles, w.ffn, w.hidden};
    const std::size_t groups = groups_of(w.format, w.columns), record = 2 * w.row_bytes + record_padding;
    take_tiles(sections, w, gate);
    w.up = {sections.take<std::uint8_t>(w.ffn * record), record, nullptr, nullptr, groups};
    w.down = w.up.rows + w.row_bytes;
    take_scales(sections, gate);
    w.up.scale = sections.take<std::uint16_t>(w.ffn * groups);
    w.up.zero = sections.take<std::int8_t>(w.ffn * groups);
    w.down_groups = groups_of(w.format, w.ffn);
    w.down_scale = sections.take<std::uint16_t>(w.down_groups * w.columns);
    w.down_zero = sections.take<std::int8_t>(w.down_groups * w.columns);
}

void take_all_tiles(Sections& sections, Weights& w) {
    const TilesShape shapes[] = {
        {&w.gate_tiles, w.ffn, w.hidden}, {&w.up_tiles, w.ffn, w.hidden}, {&w.down_tiles, w.hidden, w.ffn}};
    for (const TilesShape& shape : shapes) {
        take_tiles(sections, w, shape);
    }
    for (const TilesShape& shape : shapes) {
        take_scales(sections, shape);
    }
}

}  // namespace

const char* parse(const std::uint8_t* blob, std::size_t size, Weights& weights) {
    Header header;
    if (size < sizeof(header)) {
        return "they are shorter than a header";
    }
    std::memcpy(&header, blob, sizeof(header));
    if (const char* wrong = check(header, blob, size)) {
        return wrong;
    }
    Weights w{};
    w.format = static_cast<Format>(header.format);
    w.activation = static_cast<Activation>(header.activation);
    w.hidden = header.hidden;
    w.ffn = header.ffn;
    w.columns = round_up(w.hidden, block);
    w.row_bytes = w.format == Format::i8 ? w.columns : w.format == Format::u4 ? w.columns / 2 : w.columns * 2;
    w.is_tiled = header.layout == 1;
    Sections sections(blob);
    if (w.is_tiled) {
        take_all_tiles(sections, w);
    } else {
        take_records(sections, w);
    }
    if (sections.end() != size) {
        return "they have another size than their shape needs";
    }
    weights = w;
    return nullptr;
}

std::size_t tiled_bytes(const Weights& w) {
    const auto bytes = [&w](const Tiles& tiles, std::size_t rows) {
        return round_up(rows, tile_rows) * (tiles.blocks * (w.row_bytes / (w.columns / block)) + 3 * tiles.groups);
    };
    return bytes(w.gate_tiles, w.ffn) + bytes(w.up_tiles, w.ffn) + bytes(w.down_tiles, w.hidden);
}

// At least those of floats, or of two digits that fill spans of 512 columns.
std::size_t token_bytes(const Weights& weights) { return 4 * weights.columns + 8 * block; }

// At least 16 for every 4 blocks, begun or whole.
std::size_t token_lanes(const Weights& weights) { return 4 * (weights.columns / block) + 16; }

std::size_t sums_stride(const Weights& weights) { return weights.columns + 16; }

std::size_t decode_scratch(const Weights& weights, std::size_t rows, std::size_t neurons) {
    return (rows + 1) * round_up(neurons, 16) + 16 + rows * weights.columns;
}

std::size_t block_scratch(std::size_t rows) { return 2 * rows * block; }

}  // namespace cats_mlp
}  // namespace edge
