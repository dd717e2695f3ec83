// Cut UTF-8 text into words exactly as the regular expressions in llmctl.h do, one word at a time, left to right.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/unicode_ranges.h"

namespace llmctl {

enum class Kind : uint8_t { other, letter, number, space, newline };

inline bool is_space(Kind kind) { return kind >= Kind::space; }

// The kind of every code point below `size`; all above are `other`.
class KindTable {
public:
    static constexpr uint32_t size = 0x34000;

    static const Kind* get() {
        static const KindTable table;
        return table.kinds_.data();
    }

private:
    KindTable() : kinds_(size, Kind::other) {
        for (const Range& r : letter_ranges) fill(r, Kind::letter);
        for (const Range& r : number_ranges) fill(r, Kind::number);
        for (const Range& r : space_ranges) fill(r, Kind::space);
        kinds_['\r'] = kinds_['\n'] = Kind::newline;
    }

    void fill(const Range& range, Kind kind) {
        for (uint32_t point = range.first; point <= range.last; ++point) kinds_.at(point) = kind;
    }

    std::vector<Kind> kinds_;
};

struct Char {
    Kind kind;
    uint8_t size;  // in bytes
};

class Splitter {
public:
    using Bytes = const uint8_t*;

protected:
    // The character at p < end. A byte that begins no whole character counts as one of kind `other`.
    Char read(Bytes p, Bytes end) const {
        if (*p < 0x80) return {kinds_[*p], 1};
        const uint8_t size = *p < 0xc0 ? 1 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : 4;
        if (size == 1 || end - p < size) return {Kind::other, 1};
        uint32_t point = *p & (0x7f >> size);
        for (uint8_t i = 1; i < size; ++i) point = point << 6 | (p[i] & 0x3f);
        return {point < KindTable::size ? kinds_[point] : Kind::other, size};
    }

    Bytes skip(Bytes p, Bytes end, Kind kind) const {
        while (p < end) {
            const Char c = read(p, end);
            if (c.kind != kind) break;
            p += c.size;
        }
        return p;
    }

    // \s*[\r\n]+ (where asked) | \s+(?!\S) | \s+, at white space: a run leaves its last character to what follows it.
    Bytes spaces(Bytes p, Bytes end, bool end_at_newline) const {
        Bytes last = p, next = p, after_newline = nullptr;
        while (next < end) {
            const Char c = read(next, end);
            if (!is_space(c.kind)) break;
            last = next;
            next += c.size;
            if (c.kind == Kind::newline) after_newline = next;
        }
        if (end_at_newline && after_newline) return after_newline;
        return next == end || last == p ? next : last;
    }

private:
    const Kind* kinds_ = KindTable::get();
};

class WholeText : public Splitter {
public:
    Bytes next(Bytes, Bytes end) const { return end; }
};

class Gpt2Words : public Splitter {
public:
    Bytes next(Bytes p, Bytes end) const {
        if (*p == '\'') {
            if (const int size = contraction(p + 1, end)) return p + 1 + size;
        }
        const Bytes q = p + (*p == ' ' && end - p > 1);
        const Char c = read(q, end);
        return is_space(c.kind) ? spaces(p, end, false) : skip(q + c.size, end, c.kind);
    }

private:
    // Bytes of s|t|re|ve|m|ll|d at p, else 0.
    static int contraction(Bytes p, Bytes end) {
        if (p == end) return 0;
        if (*p == 's' || *p == 't' || *p == 'm' || *p == 'd') return 1;
        if (end - p < 2) return 0;
        return ((*p == 'r' || *p == 'v') && p[1] == 'e') || (*p == 'l' && p[1] == 'l') ? 2 : 0;
    }
};

template <int max_digits>
class Cl100kWords : public Splitter {
public:
    Bytes next(Bytes p, Bytes end) const {
        if (*p == '\'') {
            if (const int size = contraction(p + 1, end)) return p + 1 + size;
        }
        const Char first = read(p, end);
        const Bytes q = p + first.size;
        if (first.kind == Kind::letter) return skip(q, end, Kind::letter);
        if (first.kind == Kind::number) return digits(q, end);
        if (first.kind != Kind::newline && q < end) {
            const Char second = read(q, end);
            if (second.kind == Kind::letter) return skip(q + second.size, end, Kind::letter);
            if (*p == ' ' && second.kind == Kind::other) return marks(q + second.size, end);
        }
        return first.kind == Kind::other ? marks(q, end) : spaces(p, end, true);
    }

private:
    Bytes digits(Bytes p, Bytes end) const {
        for (int n = 1; n < max_digits && p < end; ++n) {
            const Char c = read(p, end);
            if (c.kind != Kind::number) break;
            p += c.size;
        }
        return p;
    }

    Bytes marks(Bytes p, Bytes end) const { return skip(skip(p, end, Kind::other), end, Kind::newline); }

    // Bytes of (?i:s|t|re|ve|m|ll|d) at p, else 0; the long s of U+017F is an s in another case.
    static int contraction(Bytes p, Bytes end) {
        if (p == end) return 0;
        const int a = *p | 0x20;
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1;
        if (end - p < 2) return 0;
        if (*p == 0xc5 && p[1] == 0xbf) return 2;
        const int b = p[1] | 0x20;
        return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 2 : 0;
    }
};

// The next place at or after p where every pattern but WholeText cuts, whatever stands around: after a letter, in
// front of a space. `end` where there is none.
inline const uint8_t* sure_cut(const uint8_t* p, const uint8_t* end) {
    for (; end - p > 1; ++p) {
        const int letter = *p | 0x20;
        if (p[1] == ' ' && letter >= 'a' && letter <= 'z') return p + 1;
    }
    return end;
}

}  // namespace llmctl
