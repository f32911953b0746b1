// CRC-32 as zlib computes it (polynomial 0xEDB88320), 8 bytes a step.
#pragma once

#include <array>

#include "utf8.hpp"

namespace orchestrate {

using ChecksumTables = std::array<std::array<std::uint32_t, 256>, 8>;

inline ChecksumTables make_checksum_tables() {
    ChecksumTables tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0u);
        tables[0][byte] = value;
    }
    for (std::uint32_t byte = 0; byte < 256; ++byte)
        for (std::size_t table = 1; table < 8; ++table)
            tables[table][byte] = tables[table - 1][byte] >> 8 ^ tables[0][tables[table - 1][byte] & 0xFF];
    return tables;
}

inline std::uint32_t crc32(const Byte* at, const Byte* end) {
    static const ChecksumTables tables = make_checksum_tables();
    std::uint32_t value = ~0u;
    for (; end - at >= 8; at += 8) {
        const std::uint64_t word = load8(at) ^ value;  // little-endian
        value = 0;
        for (std::size_t byte = 0; byte < 8; ++byte) value ^= tables[7 - byte][word >> 8 * byte & 0xFF];
    }
    for (; at < end; ++at) value = value >> 8 ^ tables[0][(value ^ *at) & 0xFF];
    return ~value;
}

}  // namespace orchestrate
