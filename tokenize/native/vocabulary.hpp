// A SentencePiece BPE vocabulary as tables: which characters may join, which symbols merge, in which order.
//
// Text is held with a space for each `▁`: one byte instead of three, and text needs no copy to get there. A
// symbol is a piece by its id, or a character that occurs in pieces and is none itself (ids from the size on).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "utf8.hpp"

namespace orchestrate {

using Symbol = std::uint32_t;
using Rank = std::uint32_t;  // of a merge; the lowest goes first, of equal ones the leftmost

constexpr std::uint32_t kCharacters = 0x110000;
constexpr Rank kNoMerge = ~Rank{0};

struct Piece {
    std::string text;  // with a space for each `▁`
    float score;
};

// A table that is only filled at the start: from two numbers below 2^21 to one below 2^21, in 8 bytes an entry.
class PairTable {
   public:
    static constexpr std::uint32_t kNone = (1u << 21) - 1;

    void reserve(std::size_t count) {
        bits_ = 4;
        while ((std::size_t{1} << bits_) < count + count / 2 + 2) ++bits_;
        entries_.assign(std::size_t{1} << bits_, kFree);
    }

    void put(std::uint32_t left, std::uint32_t right, std::uint32_t value) {
        const std::uint64_t key = key_of(left, right);
        std::size_t at = place(key);
        while (entries_[at] != kFree && entries_[at] >> 21 != key) at = (at + 1) & (entries_.size() - 1);
        entries_[at] = key << 21 | value;
    }

    // The value of a pair, or kNone.
    std::uint32_t find(std::uint32_t left, std::uint32_t right) const {
        const std::uint64_t key = key_of(left, right);
        std::size_t at = place(key);
        while (entries_[at] >> 21 != key) {
            if (entries_[at] == kFree) return kNone;
            at = (at + 1) & (entries_.size() - 1);
        }
        return static_cast<std::uint32_t>(entries_[at]) & kNone;
    }

   private:
    static constexpr std::uint64_t kFree = ~std::uint64_t{0};  // of no pair: keys have 42 bits

    static std::uint64_t key_of(std::uint32_t left, std::uint32_t right) { return std::uint64_t{left} << 21 | right; }
    std::size_t place(std::uint64_t key) const {
        return static_cast<std::size_t>((key * 0x9E3779B97F4A7C15ull) >> (64 - bits_));
    }

    int bits_ = 4;
    std::vector<std::uint64_t> entries_;
};

struct Merge {
    Rank rank = kNoMerge;
    Symbol symbol = 0;
};

class Vocabulary {
   public:
    // pieces[id] is empty where the id is no NORMAL piece; `user_defined` are (text, id), `bytes` the byte pieces.
    Vocabulary(const std::vector<Piece>& pieces, const std::vector<std::pair<std::string, Symbol>>& user_defined,
               const std::array<Symbol, 256>& bytes)
        : bytes_(bytes),
          size_(static_cast<Symbol>(pieces.size())),
          symbols_(kCharacters, kNone),
          sides_(kCharacters, 0),
          ascii_cuts_(128 * 128, 1) {
        std::unordered_map<std::string_view, Symbol> known;
        for (Symbol id = 0; id < size_; ++id)
            if (!pieces[id].text.empty() && !known.emplace(pieces[id].text, id).second)
                throw std::invalid_argument("the piece '" + pieces[id].text + "' is there twice");
        const std::vector<std::string> more = set_characters(pieces);
        if (size_ + more.size() >= PairTable::kNone) throw std::invalid_argument("more than two million pieces");
        for (std::size_t index = 0; index < more.size(); ++index)
            known.emplace(more[index], size_ + static_cast<Symbol>(index));
        set_merges(pieces, known);
        for (const Piece& piece : pieces) lengths_.push_back(static_cast<std::uint32_t>(piece.text.size()));
        for (const std::string& text : more) lengths_.push_back(static_cast<std::uint32_t>(text.size()));
        for (const auto& [text, id] : user_defined) {
            user_defined_[static_cast<Byte>(text[0])].emplace_back(text, id);
            has_user_defined_ = true;
        }
        for (auto& starts : user_defined_)
            std::sort(starts.begin(), starts.end(),
                      [](const auto& one, const auto& other) { return one.first.size() > other.first.size(); });
    }

    Symbol size() const { return size_; }
    Symbol byte(Byte value) const { return bytes_[value]; }
    bool has_user_defined() const { return has_user_defined_; }

    // The symbol of a character, or kNone where it occurs in no piece; `size()` or more is no piece.
    static constexpr Symbol kNone = ~Symbol{0};
    Symbol symbol(std::uint32_t character) const { return symbols_[character]; }

    std::size_t bytes_of(Symbol symbol) const { return lengths_[symbol]; }

    // Whether some piece holds the two characters one after the other; where not, no merge crosses them.
    bool joins(std::uint32_t left, std::uint32_t right) const {
        if ((left | right) < 128) return !ascii_cut(left, right);
        return (sides_[left] & kLeft) && (sides_[right] & kRight) && pairs_.find(left, right) != PairTable::kNone;
    }
    // 1 where two ASCII characters do not join.
    Byte ascii_cut(std::uint32_t left, std::uint32_t right) const { return ascii_cuts_[left * 128 + right]; }

    Merge merge(Symbol left, Symbol right) const {
        const Symbol symbol = merges_.find(left, right);
        return symbol == PairTable::kNone ? Merge{} : Merge{ranks_[symbol], symbol};
    }

    // Whether a USER_DEFINED piece begins with this byte, which is never one that continues a character.
    bool starts_user_defined(Byte byte) const { return !user_defined_[byte].empty(); }

    // The longest USER_DEFINED piece that begins at `at`: its size in bytes, or 0.
    std::size_t user_defined(const Byte* at, const Byte* end, Symbol& id) const {
        for (const auto& [text, number] : user_defined_[*at]) {
            if (static_cast<std::size_t>(end - at) >= text.size() && std::memcmp(at, text.data(), text.size()) == 0) {
                id = number;
                return text.size();
            }
        }
        return 0;
    }

   private:
    static constexpr Byte kLeft = 1, kRight = 2;

    // Number the characters, fill the table of joins, and return the characters that are no pieces.
    std::vector<std::string> set_characters(const std::vector<Piece>& pieces) {
        std::vector<std::string> more;
        std::vector<std::pair<std::uint32_t, std::uint32_t>> pairs;
        for (Symbol id = 0; id < size_; ++id) {
            const std::string& text = pieces[id].text;
            std::uint32_t size = 0;
            if (!text.empty() && character(data(text), size), size == text.size() && !text.empty())
                symbols_[character(data(text), size)] = id;
        }
        for (const Piece& piece : pieces) {
            const Byte* at = data(piece.text);
            const Byte* end = at + piece.text.size();
            std::uint32_t left = 0, size = 0;
            for (bool is_first = true; at < end; is_first = false, at += size) {
                const std::uint32_t right = character(at, size);
                if (symbols_[right] == kNone) {
                    symbols_[right] = size_ + static_cast<Symbol>(more.size());
                    more.emplace_back(reinterpret_cast<const char*>(at), size);
                }
                if (!is_first) {
                    sides_[left] |= kLeft;
                    sides_[right] |= kRight;
                    if ((left | right) < 128) ascii_cuts_[left * 128 + right] = 0;
                    pairs.emplace_back(left, right);
                }
                left = right;
            }
        }
        std::sort(pairs.begin(), pairs.end());
        pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
        pairs_.reserve(pairs.size());
        for (const auto& [left, right] : pairs) pairs_.put(left, right, 1);
        return more;
    }

    // Every way to put a piece together from two symbols, with the piece's place in the order of scores.
    void set_merges(const std::vector<Piece>& pieces, const std::unordered_map<std::string_view, Symbol>& known) {
        std::vector<float> scores;
        for (const Piece& piece : pieces)
            if (!piece.text.empty()) scores.push_back(piece.score);
        std::sort(scores.begin(), scores.end(), std::greater<float>());
        scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
        struct Found {
            Symbol left, right, symbol;
        };
        std::vector<Found> found;
        ranks_.assign(size_, kNoMerge);
        for (Symbol id = 0; id < size_; ++id) {
            const std::string_view text = pieces[id].text;
            if (text.empty()) continue;
            const auto place = std::lower_bound(scores.begin(), scores.end(), pieces[id].score, std::greater<float>());
            ranks_[id] = static_cast<Rank>(place - scores.begin());
            for (std::size_t cut = 1; cut < text.size(); ++cut) {
                const auto left = known.find(text.substr(0, cut)), right = known.find(text.substr(cut));
                if (left != known.end() && right != known.end())
                    found.push_back(Found{left->second, right->second, id});
            }
        }
        merges_.reserve(found.size());
        for (const Found& merge : found) merges_.put(merge.left, merge.right, merge.symbol);
    }

    static const Byte* data(const std::string& text) { return reinterpret_cast<const Byte*>(text.data()); }

    std::array<Symbol, 256> bytes_;
    Symbol size_;
    std::vector<Symbol> symbols_;  // by character
    std::vector<std::uint32_t> lengths_;  // by symbol, in bytes of the text
    std::vector<Byte> sides_;      // by character: whether it stands left or right in some pair
    std::vector<Byte> ascii_cuts_;
    PairTable pairs_;
    PairTable merges_;
    std::vector<Rank> ranks_;  // by symbol
    std::array<std::vector<std::pair<std::string, Symbol>>, 256> user_defined_;  // by first byte, the longest first
    bool has_user_defined_ = false;
};

}  // namespace orchestrate
