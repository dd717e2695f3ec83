// Cut UTF-8 text into words exactly as the regular expressions in llmctl.h do, one word at a time, left to right.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "cpu/unicode_ranges.h"

namespace llmctl {

enum class Kind : uint8_t { other, letter, number, space, newline };

inline bool is_space(Kind kind) { return kind >= Kind::space; }

// What some patterns ask besides: the case of a letter (`uncased` for modifiers and letters that have none), and which
// characters the library takes for digits, by a Unicode version of its own.
enum class Trait : uint8_t { none, upper, lower, uncased, mark, digit };

// The tables hold every code point below this; above there are marks, and nothing else that a pattern names.
constexpr uint32_t table_size = 0x34000;

class KindTable {
public:

    static const Kind* get() {
        static const KindTable table;
        return table.kinds_.data();
    }

private:
    KindTable() : kinds_(table_size, Kind::other) {
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

class TraitTable {
public:
    static Trait of(uint32_t point) {
        static const TraitTable table;
        if (point < table_size) return table.traits_[point];
        const bool is_mark = std::any_of(std::begin(mark_ranges), std::end(mark_ranges), [point](const Range& range) {
            return range.first <= point && point <= range.last;
        });
        return is_mark ? Trait::mark : Trait::none;
    }

private:
    TraitTable() : traits_(table_size, Trait::none) {
        for (const Range& r : letter_ranges) fill(r, Trait::uncased);
        for (const Range& r : upper_ranges) fill(r, Trait::upper);
        for (const Range& r : lower_ranges) fill(r, Trait::lower);
        for (const Range& r : mark_ranges) fill(r, Trait::mark);
        for (const Range& r : digit_ranges) fill(r, Trait::digit);
    }

    void fill(const Range& range, Trait value) {
        for (uint32_t point = range.first; point <= range.last && point < table_size; ++point) traits_[point] = value;
    }

    std::vector<Trait> traits_;
};

struct Char {
    Kind kind;
    uint8_t size;  // in bytes
    uint32_t point;
};

class Splitter {
public:
    using Bytes = const uint8_t*;

protected:
    // The character at p < end. A byte that begins no whole character counts as one of kind `other`.
    Char read(Bytes p, Bytes end) const {
        if (*p < 0x80) return {kinds_[*p], 1, *p};
        const uint8_t size = *p < 0xc0 ? 1 : *p < 0xe0 ? 2 : *p < 0xf0 ? 3 : 4;
        if (size == 1 || end - p < size) return {Kind::other, 1, no_point};
        uint32_t point = *p & (0x7f >> size);
        for (uint8_t i = 1; i < size; ++i) point = point << 6 | (p[i] & 0x3f);
        return {point < table_size ? kinds_[point] : Kind::other, size, point};
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

    // \p{N}{1,most} of which the first is in front of p.
    Bytes digits(Bytes p, Bytes end, int most) const {
        for (int n = 1; n < most && p < end; ++n) {
            const Char c = read(p, end);
            if (c.kind != Kind::number) break;
            p += c.size;
        }
        return p;
    }

private:
    static constexpr uint32_t no_point = 0x110000;

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
        if (first.kind == Kind::number) return digits(q, end, max_digits);
        if (first.kind != Kind::newline && q < end) {
            const Char second = read(q, end);
            if (second.kind == Kind::letter) return skip(q + second.size, end, Kind::letter);
            if (*p == ' ' && second.kind == Kind::other) return marks(q + second.size, end);
        }
        return first.kind == Kind::other ? marks(q, end) : spaces(p, end, true);
    }

private:
    Bytes marks(Bytes p, Bytes end) const { return skip(skip(p, end, Kind::other), end, Kind::newline); }
};

// Words end where capitals begin again, keep a contraction, and may hold marks.
class O200kWords : public Splitter {
public:
    Bytes next(Bytes p, Bytes end) const {
        const Char first = read(p, end);
        const Bytes q = p + first.size;
        if (first.kind == Kind::number) return digits(q, end, 3);
        if (first.kind == Kind::newline) return spaces(p, end, true);
        const bool is_mark = first.kind == Kind::other && TraitTable::of(first.point) == Trait::mark;
        if (first.kind != Kind::letter) {
            if (const Bytes stop = word(q, end, !is_mark)) return stop;
        }
        if (first.kind == Kind::letter || is_mark) return word(p, end, true);
        if (first.kind == Kind::other) return other(q, end);
        if (*p == ' ' && q < end) {
            const Char second = read(q, end);
            if (second.kind == Kind::other) return other(q + second.size, end);
        }
        return spaces(p, end, true);
    }

private:
    static bool is_both(Trait c) { return c == Trait::uncased || c == Trait::mark; }
    static bool may_be_upper(Trait c) { return c == Trait::upper || is_both(c); }
    static bool may_be_lower(Trait c) { return c == Trait::lower || is_both(c); }

    // [upper]*[lower]+ or, where that finds nothing and is allowed to, [upper]+; with the contraction behind it. Marks
    // and letters without case are both. Null where neither is there.
    Bytes word(Bytes p, Bytes end, bool allow_upper) const {
        const Bytes start = p;
        Bytes after_lower = nullptr;  // behind the last character that [lower]+ can take
        Trait last = Trait::none;
        while (p < end) {
            const Char c = read(p, end);
            last = TraitTable::of(c.point);
            if (!may_be_upper(last)) break;
            p += c.size;
            if (may_be_lower(last)) after_lower = p;
        }
        if (p < end && last == Trait::lower) return contracted(lower(p, end), end);
        if (after_lower) return contracted(after_lower, end);
        return allow_upper && p > start ? contracted(p, end) : nullptr;
    }

    Bytes lower(Bytes p, Bytes end) const {
        while (p < end) {
            const Char c = read(p, end);
            if (!may_be_lower(TraitTable::of(c.point))) break;
            p += c.size;
        }
        return p;
    }

    static Bytes contracted(Bytes p, Bytes end) {
        const int size = p < end && *p == '\'' ? contraction(p + 1, end) : 0;
        return size ? p + 1 + size : p;
    }

    // [^\s\p{L}\p{N}]*[\r\n/]*
    Bytes other(Bytes p, Bytes end) const {
        p = skip(p, end, Kind::other);
        while (p < end && (*p == '\r' || *p == '\n' || *p == '/')) ++p;
        return p;
    }
};

// GPT-2's words of the stretches between numbers, each of which stands alone.
class Gpt2WordsDigitsApart : public Splitter {
public:
    Bytes next(Bytes p, Bytes end) {
        if (p < stretch_end_) return words_.next(p, stretch_end_);
        const Char first = read(p, end);
        if (is_digit(first)) return p + first.size;
        for (stretch_end_ = p + first.size; stretch_end_ < end;) {
            const Char c = read(stretch_end_, end);
            if (is_digit(c)) break;
            stretch_end_ += c.size;
        }
        return words_.next(p, stretch_end_);
    }

private:
    static bool is_digit(const Char& c) {
        return c.point < 0x80 ? c.kind == Kind::number : TraitTable::of(c.point) == Trait::digit;
    }

    Gpt2Words words_;
    Bytes stretch_end_ = nullptr;
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
