// The text of a JSON line, where the line is plainly right; whatever is not plain is left to records.py.
//
// A line counts as plain when it is one object by RFC 8259's grammar, nested at most 32 deep, no object of it
// with more than 32 keys or the same key twice, no key with an escape, and the wanted key of the outermost
// object holds a string without a lone surrogate. Such a line is read by records.py to the same text; so
// nothing is accepted here that the reference would refuse. The caller has checked that the line is UTF-8.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "utf8.hpp"

namespace orchestrate {

class JsonLine {
   public:
    explicit JsonLine(std::string_view key) : key_(key) {}

    // Parse [at, end), which holds no line end but spaces may. False: not plain.
    bool parse(const Byte* at, const Byte* end) {
        at_ = at;
        end_ = end;
        text_ = nullptr;
        keys_.clear();
        spaces();
        if (!object(0)) return false;
        spaces();
        return at_ == end_ && text_ != nullptr;
    }

    // Upper bound of the text's size in bytes, after `parse`.
    std::size_t room() const { return static_cast<std::size_t>(text_end_ - text_); }

    // Write the text of the line parsed last and return its end, or null where it has a lone surrogate.
    Byte* write_text(Byte* to) const {
        const Byte* from = text_;
        if (!text_has_escapes_) {
            std::memcpy(to, from, room());
            return to + room();
        }
        while (from < text_end_) {
            const void* found = std::memchr(from, '\\', static_cast<std::size_t>(text_end_ - from));
            const Byte* stop = found == nullptr ? text_end_ : static_cast<const Byte*>(found);
            std::memcpy(to, from, static_cast<std::size_t>(stop - from));
            to += stop - from;
            from = stop;
            while (from < text_end_ && *from == '\\') {
                if (from[1] == 'u') {
                    std::uint32_t value = hexadecimal(from + 2);
                    from += 6;
                    if (value >= 0xD800 && value < 0xE000) {
                        if (value >= 0xDC00 || text_end_ - from < 6 || from[0] != '\\' || from[1] != 'u') return nullptr;
                        const std::uint32_t low = hexadecimal(from + 2);
                        if (low < 0xDC00 || low >= 0xE000) return nullptr;
                        value = 0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00);
                        from += 6;
                    }
                    to = put_character(to, value);
                } else {
                    *to++ = simple_escape(from[1]);
                    from += 2;
                }
            }
        }
        return to;
    }

   private:
    static constexpr int kDeepest = 32;
    static constexpr std::size_t kMostKeys = 32;
    static constexpr std::ptrdiff_t kLongestNumber = 300;  // Python refuses whole numbers of more than 4,300 digits

    void spaces() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
    }

    bool take(Byte byte) {
        if (at_ == end_ || *at_ != byte) return false;
        ++at_;
        return true;
    }

    bool object(int depth) {
        if (depth > kDeepest || !take('{')) return false;
        const std::size_t first_key = keys_.size();
        spaces();
        if (take('}')) return true;
        do {
            spaces();
            const Byte* begin = at_ + 1;
            bool escapes = false;
            if (!string(escapes) || escapes) return false;
            const std::string_view key(reinterpret_cast<const char*>(begin), static_cast<std::size_t>(at_ - 1 - begin));
            for (std::size_t other = first_key; other < keys_.size(); ++other)
                if (keys_[other] == key) return false;
            if (keys_.size() - first_key >= kMostKeys) return false;
            keys_.push_back(key);
            spaces();
            if (!take(':')) return false;
            spaces();
            if (depth == 0 && key == key_) {
                text_ = at_ + 1;
                text_has_escapes_ = false;
                if (!string(text_has_escapes_)) return false;
                text_end_ = at_ - 1;
            } else if (!value(depth + 1)) {
                return false;
            }
            spaces();
        } while (take(','));
        keys_.resize(first_key);
        return take('}');
    }

    bool array(int depth) {
        if (depth > kDeepest || !take('[')) return false;
        spaces();
        if (take(']')) return true;
        do {
            spaces();
            if (!value(depth + 1)) return false;
            spaces();
        } while (take(','));
        return take(']');
    }

    bool value(int depth) {
        if (at_ == end_) return false;
        bool escapes = false;
        switch (*at_) {
            case '"': return string(escapes);
            case '{': return object(depth);
            case '[': return array(depth);
            case 't': return word("true");
            case 'f': return word("false");
            case 'n': return word("null");
            default: return number();
        }
    }

    bool word(std::string_view expected) {
        if (static_cast<std::size_t>(end_ - at_) < expected.size()) return false;
        if (std::memcmp(at_, expected.data(), expected.size()) != 0) return false;
        at_ += expected.size();
        return true;
    }

    bool digits() {
        const Byte* begin = at_;
        while (at_ < end_ && *at_ >= '0' && *at_ <= '9') ++at_;
        return at_ > begin;
    }

    bool number() {
        const Byte* begin = at_;
        take('-');
        if (!take('0') && !digits()) return false;
        if (take('.') && !digits()) return false;
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            if (!digits()) return false;
        }
        return at_ - begin <= kLongestNumber;
    }

    // A string with its quotes; escapes are checked and not decoded.
    bool string(bool& has_escapes) {
        if (!take('"')) return false;
        while (true) {
            at_ = plain_end(at_, end_);
            if (at_ == end_) return false;
            if (*at_ == '"') {
                ++at_;
                return true;
            }
            if (*at_ != '\\' || end_ - at_ < 2) return false;  // a control character
            has_escapes = true;
            if (at_[1] == 'u') {
                if (end_ - at_ < 6) return false;
                for (int digit = 2; digit < 6; ++digit)
                    if (!is_hexadecimal(at_[digit])) return false;
                at_ += 6;
            } else {
                if (simple_escape(at_[1]) == 0) return false;
                at_ += 2;
            }
        }
    }

    // The first quote, backslash or control character in [at, end), or its end; 8 bytes at a time.
    static const Byte* plain_end(const Byte* at, const Byte* end) {
        constexpr std::uint64_t ones = 0x0101010101010101ull, highs = 0x8080808080808080ull;
        while (end - at >= 8) {
            const std::uint64_t word = load8(at);
            const std::uint64_t quotes = word ^ ones * '"', slashes = word ^ ones * '\\';
            const std::uint64_t stops =
                (((quotes - ones) & ~quotes) | ((slashes - ones) & ~slashes) | ((word - ones * 0x20) & ~word)) & highs;
            if (stops != 0) break;
            at += 8;
        }
        while (at < end && *at != '"' && *at != '\\' && *at >= 0x20) ++at;
        return at;
    }

    static bool is_hexadecimal(Byte byte) {
        return (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'f') || (byte >= 'A' && byte <= 'F');
    }

    static std::uint32_t hexadecimal(const Byte* at) {
        std::uint32_t value = 0;
        for (int digit = 0; digit < 4; ++digit)
            value = value << 4 | static_cast<std::uint32_t>(at[digit] <= '9' ? at[digit] - '0' : (at[digit] | 0x20) - 'a' + 10);
        return value;
    }

    // What a backslash and this letter stand for; 0 where nothing does.
    static Byte simple_escape(Byte letter) {
        switch (letter) {
            case '"': case '\\': case '/': return letter;
            case 'b': return '\b';
            case 'f': return '\f';
            case 'n': return '\n';
            case 'r': return '\r';
            case 't': return '\t';
            default: return 0;
        }
    }

    std::string_view key_;
    const Byte* at_ = nullptr;
    const Byte* end_ = nullptr;
    const Byte* text_ = nullptr;
    const Byte* text_end_ = nullptr;
    bool text_has_escapes_ = false;
    std::vector<std::string_view> keys_;  // of the objects that are open, the outermost first
};

}  // namespace orchestrate
