// SentencePiece's BPE on whole documents: cut where no merge can cross, look words up, merge what is new.
//
// Why the ids equal sentencepiece's. A merge makes a piece of the vocabulary. So where no piece holds the
// characters a and b one after the other, no merge crosses the place between them, and what stands left of it
// cannot change what happens right of it: text is cut there. Within a word the merges are done by score, of
// equal scores the leftmost first, as sentencepiece's agenda does; one word has always the same ids, so they
// are kept. USER_DEFINED pieces are taken first, the longest from the left, and merge with nothing.
// A character without a piece becomes the pieces of its bytes.
#pragma once

#include <iterator>

#include "vocabulary.hpp"

namespace orchestrate {

constexpr std::size_t kPadding = 32;  // bytes that may be read behind a text, and ids written behind its end

template <typename Id>
class Encoder {
   public:
    explicit Encoder(const Vocabulary& vocabulary)
        : vocabulary_(vocabulary), short_(std::size_t{1} << kShortBits), long_(std::size_t{1} << kLongBits) {}

    // Append the ids of [at, end), valid UTF-8 with a space for each `▁`, and return where the next id goes.
    // `to` has room for one id a byte and kPadding more; kPadding bytes behind `end` may be read.
    Id* encode(const Byte* at, const Byte* end, Id* to) {
        if (!vocabulary_.has_user_defined()) return encode_free(at, end, to);
        const Byte* begin = at;
        while (true) {
            while (at < end && !vocabulary_.starts_user_defined(*at)) ++at;
            if (at == end) break;
            Symbol id = 0;
            const std::size_t size = vocabulary_.user_defined(at, end, id);
            if (size == 0) {
                ++at;
                continue;
            }
            to = encode_free(begin, at, to);
            *to++ = static_cast<Id>(id);
            begin = at += size;
        }
        return encode_free(begin, end, to);
    }

   private:
    static constexpr std::size_t kAhead = 64;  // words cut before the first is looked up
    static constexpr std::size_t kShort = 48;  // most symbols that are merged by scanning

    // The ids of a word that was seen. Short ones lie two in a cache line where ids have 16 bits.
    template <std::size_t kBytes, std::size_t kIds, std::size_t kAlign>
    struct alignas(kAlign) Kept {
        static constexpr std::size_t kWords = kBytes / 8;
        std::uint64_t key[kWords] = {};
        std::uint8_t size = 0;
        std::uint8_t count = 0;
        Id ids[kIds] = {};
    };
    static constexpr bool kIsSmall = sizeof(Id) == 2;
    using Short = Kept<16, kIsSmall ? 7 : 10, kIsSmall ? 32 : 64>;
    using Long = Kept<48, kIsSmall ? 7 : 15, kIsSmall ? 64 : 128>;
    static constexpr int kShortBits = 19, kLongBits = 14;  // 16 MB and 1 MB where ids have 16 bits

    struct Word {
        std::uint64_t key[2];
        Short* entry;  // null: of more than 16 bytes
    };

    // In three passes over some words, each without a branch that the length of a word decides: find where they
    // end; have the entries fetched; append their ids.
    Id* encode_free(const Byte* at, const Byte* end, Id* to) {
        const Byte* ends[kAhead + 8];
        Word words[kAhead + 8];
        const Byte* begin = at;
        while (begin < end) {
            const std::size_t count = find_ends(begin, at, end, ends);
            const Byte* start = begin;
            for (std::size_t index = 0; index < count; ++index) {
                words[index] = word(start, ends[index]);
                start = ends[index];
            }
            for (std::size_t index = 0; index < count; ++index) {
                to = put(words[index], begin, ends[index], to);
                begin = ends[index];
            }
        }
        return to;
    }

    // Write where the words end that begin at `begin`, of which all up to `at` is known to be one, and return how
    // many; `at` becomes how far the text was looked at.
    std::size_t find_ends(const Byte* begin, const Byte*& at, const Byte* end, const Byte** ends) const {
        std::size_t count = 0;
        std::uint32_t left = 0, size = 0;
        if (at == begin) {
            left = character(at, size);
            at += size;
        } else {
            const Byte* last = at - 1;
            while (is_continuation(*last)) --last;
            left = character(last, size);
        }
        while (at < end && count < kAhead) {
            if (end - at >= 8 && left < 128 && (load8(at) & 0x8080808080808080ull) == 0) {
                for (std::size_t step = 0; step < 8; ++step) {
                    const Byte right = at[step];
                    ends[count] = at + step;
                    count += vocabulary_.ascii_cut(left, right);
                    left = right;
                }
                at += 8;
            } else {
                const std::uint32_t right = character(at, size);
                ends[count] = at;
                count += !vocabulary_.joins(left, right);
                left = right;
                at += size;
            }
        }
        if (at == end) ends[count++] = end;
        return count;
    }

    // A word's key, with its entry on the way.
    Word word(const Byte* begin, const Byte* end) {
        const auto size = static_cast<std::size_t>(end - begin);
        Word word{};
        if (size > 16) return word;
        word.key[0] = load8(begin) & kMasks[size];
        word.key[1] = load8(begin + 8) & kMasks[17 + size];
        word.entry = &short_[mixed(word.key[0] ^ size, word.key[1]) >> (64 - kShortBits)];
        __builtin_prefetch(word.entry);
        return word;
    }

    // By size: which bytes of the first 8 belong to the word; from 17 on, of the second 8.
    static constexpr std::array<std::uint64_t, 34> kMasks = [] {
        std::array<std::uint64_t, 34> masks{};
        for (std::size_t size = 0; size <= 16; ++size) {
            masks[size] = size >= 8 ? ~0ull : (1ull << 8 * size) - 1;
            masks[17 + size] = size <= 8 ? 0 : size == 16 ? ~0ull : (1ull << 8 * (size - 8)) - 1;
        }
        return masks;
    }();

    static std::uint64_t mixed(std::uint64_t one, std::uint64_t other) {
        one *= 0x9E3779B97F4A7C15ull;
        return (one ^ one >> 32 ^ other) * 0xD6E8FEB86659FD93ull;
    }

    Id* put(const Word& word, const Byte* begin, const Byte* end, Id* to) {
        if (word.entry != nullptr) return put_kept(*word.entry, word.key, begin, end, to);
        const auto size = static_cast<std::size_t>(end - begin);
        if (size > 48) return merged(begin, end, to);
        std::uint64_t key[6] = {};
        std::memcpy(key, begin, size);
        std::uint64_t hash = size;
        for (const std::uint64_t part : key) hash = mixed(hash ^ hash >> 32, part);
        return put_kept(long_[hash >> (64 - kLongBits)], key, begin, end, to);
    }

    // Append the ids that are kept, or merge the word and keep its ids in place of those that were there.
    template <typename Entry>
    Id* put_kept(Entry& entry, const std::uint64_t* key, const Byte* begin, const Byte* end, Id* to) {
        bool is_same = entry.size == end - begin;
        for (std::size_t part = 0; part < Entry::kWords; ++part) is_same &= entry.key[part] == key[part];
        if (is_same) {
            std::memcpy(to, entry.ids, sizeof entry.ids);
            return to + entry.count;
        }
        Id* const last = merged(begin, end, to);
        const auto count = static_cast<std::size_t>(last - to);
        if (count <= std::size(entry.ids)) {
            std::copy(key, key + Entry::kWords, entry.key);
            entry.size = static_cast<std::uint8_t>(end - begin);
            entry.count = static_cast<std::uint8_t>(count);
            std::copy(to, last, entry.ids);
        }
        return last;
    }

    // Merge a word's characters until nothing merges, and append the ids.
    Id* merged(const Byte* at, const Byte* end, Id* to) {
        symbols_.clear();
        std::uint32_t size = 0;
        for (const Byte* next = at; next < end; next += size) {
            const Symbol symbol = vocabulary_.symbol(character(next, size));
            if (symbol == Vocabulary::kNone) return bytes_of(at, end, to);  // joins with nothing: it stands alone
            symbols_.push_back(symbol);
        }
        if (symbols_.size() <= kShort)
            merge_short();
        else
            merge_long();
        for (const Symbol symbol : symbols_) {
            const std::size_t bytes = vocabulary_.bytes_of(symbol);
            if (symbol < vocabulary_.size())
                *to++ = static_cast<Id>(symbol);
            else
                to = bytes_of(at, at + bytes, to);
            at += bytes;
        }
        return to;
    }

    // By scanning for the best merge each time: the least work for the usual word.
    void merge_short() {
        std::size_t count = symbols_.size();
        Symbol* symbols = symbols_.data();
        Merge merges[kShort];
        for (std::size_t index = 0; index + 1 < count; ++index)
            merges[index] = vocabulary_.merge(symbols[index], symbols[index + 1]);
        while (count > 1) {
            std::size_t best = 0;
            for (std::size_t index = 1; index + 1 < count; ++index)
                if (merges[index].rank < merges[best].rank) best = index;
            if (merges[best].rank == kNoMerge) break;
            symbols[best] = merges[best].symbol;
            --count;
            std::memmove(symbols + best + 1, symbols + best + 2, (count - best - 1) * sizeof(Symbol));
            std::memmove(merges + best, merges + best + 1, (count - best) * sizeof(Merge));
            if (best > 0) merges[best - 1] = vocabulary_.merge(symbols[best - 1], symbols[best]);
            if (best + 1 < count) merges[best] = vocabulary_.merge(symbols[best], symbols[best + 1]);
        }
        symbols_.resize(count);
    }

    // With a heap of the merges and links between the symbols: n log n, for runs of any length.
    void merge_long() {
        const std::size_t count = symbols_.size();
        before_.resize(count);
        after_.resize(count);
        heap_.clear();
        for (std::size_t index = 0; index < count; ++index) {
            before_[index] = index - 1;  // of the first: the largest number
            after_[index] = index + 1;
        }
        const auto offer = [this](std::size_t left, std::size_t right) {
            const Merge merge = vocabulary_.merge(symbols_[left], symbols_[right]);
            if (merge.rank == kNoMerge) return;
            heap_.push_back(Offer{merge.rank, merge.symbol, left, symbols_[left], symbols_[right]});
            std::push_heap(heap_.begin(), heap_.end());
        };
        for (std::size_t index = 0; index + 1 < count; ++index) offer(index, index + 1);
        while (!heap_.empty()) {
            const Offer best = heap_.front();
            std::pop_heap(heap_.begin(), heap_.end());
            heap_.pop_back();
            const std::size_t left = best.left, right = after_[left];
            if (symbols_[left] != best.one || right >= count || symbols_[right] != best.other) continue;  // merged since
            symbols_[left] = best.symbol;
            symbols_[right] = Vocabulary::kNone;
            after_[left] = after_[right];
            if (after_[left] < count) {
                before_[after_[left]] = left;
                offer(left, after_[left]);
            }
            if (left > 0) offer(before_[left], left);
        }
        symbols_.erase(std::remove(symbols_.begin(), symbols_.end(), Vocabulary::kNone), symbols_.end());
    }

    struct Offer {
        Rank rank;
        Symbol symbol;
        std::size_t left;
        Symbol one, other;
        bool operator<(const Offer& than) const { return rank != than.rank ? rank > than.rank : left > than.left; }
    };

    Id* bytes_of(const Byte* at, const Byte* end, Id* to) {
        for (; at < end; ++at) *to++ = static_cast<Id>(vocabulary_.byte(*at));
        return to;
    }

    const Vocabulary& vocabulary_;
    std::vector<Short> short_;
    std::vector<Long> long_;
    std::vector<Symbol> symbols_;               // of the word that is merged
    std::vector<std::size_t> before_, after_;  // its symbols' neighbours
    std::vector<Offer> heap_;
};

}  // namespace orchestrate
