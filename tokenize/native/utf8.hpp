// UTF-8 as Python reads it strictly: no overlong form, no surrogate, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace orchestrate {

using Byte = std::uint8_t;

inline std::uint64_t load8(const Byte* at) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    return word;
}

inline bool is_continuation(Byte byte) { return (byte & 0xC0) == 0x80; }

// Whether [at, end) is valid UTF-8.
inline bool is_utf8(const Byte* at, const Byte* end) {
    while (at < end) {
        if (*at < 0x80) {
            while (end - at >= 8 && (load8(at) & 0x8080808080808080ull) == 0) at += 8;
            while (at < end && *at < 0x80) ++at;
            continue;
        }
        const std::ptrdiff_t left = end - at;
        const Byte first = at[0];
        if (first < 0xC2) return false;
        if (first < 0xE0) {
            if (left < 2 || !is_continuation(at[1])) return false;
            at += 2;
        } else if (first < 0xF0) {
            if (left < 3 || !is_continuation(at[1]) || !is_continuation(at[2])) return false;
            if (first == 0xE0 && at[1] < 0xA0) return false;
            if (first == 0xED && at[1] > 0x9F) return false;
            at += 3;
        } else {
            if (first > 0xF4 || left < 4) return false;
            if (!is_continuation(at[1]) || !is_continuation(at[2]) || !is_continuation(at[3])) return false;
            if (first == 0xF0 && at[1] < 0x90) return false;
            if (first == 0xF4 && at[1] > 0x8F) return false;
            at += 4;
        }
    }
    return true;
}

// The character at `at` of valid UTF-8, and its size in bytes.
inline std::uint32_t character(const Byte* at, std::uint32_t& size) {
    const std::uint32_t first = at[0];
    if (first < 0x80) {
        size = 1;
        return first;
    }
    if (first < 0xE0) {
        size = 2;
        return (first & 0x1F) << 6 | (at[1] & 0x3F);
    }
    if (first < 0xF0) {
        size = 3;
        return (first & 0x0F) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3F);
    }
    size = 4;
    return (first & 0x07) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3F);
}

// Writes a character and returns where the next goes.
inline Byte* put_character(Byte* to, std::uint32_t value) {
    if (value < 0x80) {
        *to++ = static_cast<Byte>(value);
    } else if (value < 0x800) {
        *to++ = static_cast<Byte>(0xC0 | value >> 6);
        *to++ = static_cast<Byte>(0x80 | (value & 0x3F));
    } else if (value < 0x10000) {
        *to++ = static_cast<Byte>(0xE0 | value >> 12);
        *to++ = static_cast<Byte>(0x80 | (value >> 6 & 0x3F));
        *to++ = static_cast<Byte>(0x80 | (value & 0x3F));
    } else {
        *to++ = static_cast<Byte>(0xF0 | value >> 18);
        *to++ = static_cast<Byte>(0x80 | (value >> 12 & 0x3F));
        *to++ = static_cast<Byte>(0x80 | (value >> 6 & 0x3F));
        *to++ = static_cast<Byte>(0x80 | (value & 0x3F));
    }
    return to;
}

}  // namespace orchestrate
