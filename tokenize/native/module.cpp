// Python's door to the encoder: blocks of JSON lines or of texts in, arrays of ids out.
// What it promises and how it is checked stands in tokenize/native_engine.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "checksum.hpp"
#include "encoder.hpp"
#include "json_line.hpp"
#include "vocabulary.hpp"

namespace py = pybind11;

namespace orchestrate {
namespace {

constexpr std::int64_t kCheckEvery = 1000;
constexpr Byte kSpaceSymbol[] = {0xE2, 0x96, 0x81};  // ▁

template <typename Value>
py::array_t<Value> array_of(std::vector<Value>&& values) {
    auto* owned = new std::vector<Value>(std::move(values));
    py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<Value>*>(pointer); });
    return py::array_t<Value>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

// What became of the documents of a block so far.
template <typename Id>
struct Result {
    std::vector<Id> ids;
    std::vector<std::int32_t> lengths;
    std::vector<std::int64_t> text_bytes;
    std::vector<std::uint32_t> checksums;
    std::int64_t records = 0;
    std::int64_t empty = 0;
    py::list checks;  // (text, first id, end of the ids) of the documents that the reference shall encode too
};

template <typename Id>
class BlockEncoder {
   public:
    BlockEncoder(std::vector<std::pair<py::bytes, float>> pieces,
                 std::vector<std::pair<py::bytes, Symbol>> user_defined, std::array<Symbol, 256> bytes,
                 bool add_dummy_prefix, Symbol end_of_document)
        : vocabulary_(own(pieces), own(user_defined), bytes),
          encoder_(vocabulary_),
          add_dummy_prefix_(add_dummy_prefix),
          end_of_document_(static_cast<Id>(end_of_document)) {}

    // Encode JSON lines. `decide(offset, line)` is asked of a line that is not plain; it returns its text or None.
    py::tuple encode_lines(const py::buffer& lines, const std::string& text_key, const py::function& decide) {
        const py::buffer_info info = lines.request();
        const Byte* const begin = static_cast<const Byte*>(info.ptr);
        const Byte* const end = begin + info.size * info.itemsize;
        Result<Id> result;
        JsonLine line(text_key);
        py::gil_scoped_release released;
        result.ids.reserve(static_cast<std::size_t>(end - begin) / 2);
        const bool all_utf8 = is_utf8(begin, end);
        for (const Byte* at = begin; at < end;) {
            const void* found = std::memchr(at, '\n', static_cast<std::size_t>(end - at));
            const Byte* stop = found == nullptr ? end : static_cast<const Byte*>(found);
            if (!is_blank(at, stop)) {
                ++result.records;
                if (!((all_utf8 || is_utf8(at, stop)) && line.parse(at, stop) && take(line, result))) {
                    py::gil_scoped_acquire acquired;
                    const py::object text = decide(at - begin, bytes_of(at, stop));
                    if (!text.is_none()) take_bytes(text.cast<std::string_view>(), result);
                }
            }
            at = stop + 1;
        }
        py::gil_scoped_acquire acquired;
        return finished(std::move(result));
    }

    // Encode texts that are each UTF-8. `refuse(number)` is told of one that is not.
    py::tuple encode_texts(const py::sequence& texts, const py::function& refuse) {
        Result<Id> result;
        for (py::ssize_t number = 0; number < static_cast<py::ssize_t>(texts.size()); ++number) {
            const py::object item = texts[static_cast<std::size_t>(number)];
            const auto text = item.cast<std::string_view>();
            const Byte* begin = reinterpret_cast<const Byte*>(text.data());
            ++result.records;
            if (is_utf8(begin, begin + text.size()))
                take_bytes(text, result);
            else
                refuse(number);
        }
        return finished(std::move(result));
    }

   private:
    static std::vector<Piece> own(const std::vector<std::pair<py::bytes, float>>& pieces) {
        std::vector<Piece> owned;
        for (const auto& [text, score] : pieces) owned.push_back(Piece{std::string(text), score});
        return owned;
    }

    static std::vector<std::pair<std::string, Symbol>> own(const std::vector<std::pair<py::bytes, Symbol>>& pieces) {
        std::vector<std::pair<std::string, Symbol>> owned;
        for (const auto& [text, id] : pieces) owned.emplace_back(std::string(text), id);
        return owned;
    }

    static py::bytes bytes_of(const Byte* begin, const Byte* end) {
        return py::bytes(reinterpret_cast<const char*>(begin), static_cast<std::size_t>(end - begin));
    }

    // Whether a line is no record: what bytes.strip() leaves nothing of.
    static bool is_blank(const Byte* at, const Byte* end) {
        while (at < end && (*at == ' ' || (*at >= '\t' && *at <= '\r'))) ++at;
        return at == end;
    }

    bool take(const JsonLine& line, Result<Id>& result) {
        text_.resize(line.room() + 1 + kPadding);
        Byte* begin = text_.data() + 1;
        Byte* end = line.write_text(begin);
        if (end == nullptr) return false;
        encode(begin, end, result);
        return true;
    }

    void take_bytes(std::string_view text, Result<Id>& result) {
        text_.resize(text.size() + 1 + kPadding);
        std::memcpy(text_.data() + 1, text.data(), text.size());
        encode(text_.data() + 1, text_.data() + 1 + text.size(), result);
    }

    // Encode the text in [begin, end), before which there is one byte of room.
    void encode(Byte* begin, Byte* end, Result<Id>& result) {
        const auto size = static_cast<std::int64_t>(end - begin);
        const bool is_checked = documents_++ % kCheckEvery == 0;
        py::object text;
        if (is_checked) {
            py::gil_scoped_acquire acquired;
            text = bytes_of(begin, end);
        }
        const std::size_t first = result.ids.size();
        if (size == 0) {
            ++result.empty;
        } else {
            result.checksums.push_back(crc32(begin, end));
            end = replace_space_symbols(begin, end);
            if (add_dummy_prefix_) *--begin = ' ';
            result.ids.resize(first + static_cast<std::size_t>(end - begin) + 1 + kPadding);
            Id* last = encoder_.encode(begin, end, result.ids.data() + first);
            *last++ = end_of_document_;
            result.ids.resize(static_cast<std::size_t>(last - result.ids.data()));
            result.lengths.push_back(static_cast<std::int32_t>(result.ids.size() - first));
            result.text_bytes.push_back(size);
        }
        if (is_checked) {
            py::gil_scoped_acquire acquired;
            result.checks.append(py::make_tuple(text, first, result.ids.size()));
            text = py::object();
        }
    }

    // Put a space for each `▁` of the text, and return its end.
    static Byte* replace_space_symbols(Byte* begin, Byte* end) {
        void* found = std::memchr(begin, kSpaceSymbol[0], static_cast<std::size_t>(end - begin));  // often nowhere
        if (found == nullptr) return end;
        begin = static_cast<Byte*>(found);
        found = memmem(begin, static_cast<std::size_t>(end - begin), kSpaceSymbol, sizeof kSpaceSymbol);
        if (found == nullptr) return end;
        Byte* to = static_cast<Byte*>(found);
        for (const Byte* from = to; from < end;) {
            if (end - from >= 3 && std::memcmp(from, kSpaceSymbol, sizeof kSpaceSymbol) == 0) {
                *to++ = ' ';
                from += 3;
            } else {
                *to++ = *from++;
            }
        }
        return to;
    }

    static py::tuple finished(Result<Id>&& result) {
        return py::make_tuple(array_of(std::move(result.ids)), array_of(std::move(result.lengths)),
                              array_of(std::move(result.text_bytes)), array_of(std::move(result.checksums)),
                              result.records, result.empty, result.checks);
    }

    Vocabulary vocabulary_;
    Encoder<Id> encoder_;
    bool add_dummy_prefix_;
    Id end_of_document_;
    std::int64_t documents_ = 0;
    std::vector<Byte> text_;
};

template <typename Id>
void declare(py::module_& module, const char* name) {
    py::class_<BlockEncoder<Id>>(module, name)
        .def(py::init<std::vector<std::pair<py::bytes, float>>, std::vector<std::pair<py::bytes, Symbol>>,
                      std::array<Symbol, 256>, bool, Symbol>(),
             py::kw_only(), py::arg("pieces"), py::arg("user_defined"), py::arg("bytes"), py::arg("add_dummy_prefix"),
             py::arg("end_of_document"))
        .def("encode_lines", &BlockEncoder<Id>::encode_lines, py::arg("lines"), py::arg("text_key"), py::arg("decide"))
        .def("encode_texts", &BlockEncoder<Id>::encode_texts, py::arg("texts"), py::arg("refuse"));
}

}  // namespace
}  // namespace orchestrate

PYBIND11_MODULE(native_encoder, module) {
    module.doc() = "SentencePiece BPE for blocks of documents; see orchestrator.tokenize.native_engine.";
    module.attr("VERSION") = 1;  // raised by a change after which a unit that is half done should not be gone on with
    orchestrate::declare<std::uint16_t>(module, "Encoder16");
    orchestrate::declare<std::int32_t>(module, "Encoder32");
}
