// Where the like of a text's end was written before, in its prompt or in any response to it, and what followed there.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <unordered_map>
#include <vector>

namespace fuse {

// Prompts and responses to them. Tokens are numbers from 0 on, below 2^31.
//
// Every two neighbouring tokens lead to the latest place that follows them, and each place to the one before it: lists
// in which the longest match is looked for, as in the dictionary of a compressor. Source: Gailly and Adler's zlib,
// deflate.c, longest_match; it drops old text where we drop whole prompts.
class SuffixIndex {
 public:
  using Token = std::int32_t;
  using Tokens = std::vector<Token>;

  // Drops the prompts whose last response was closed longest ago, with all responses, beyond so many tokens.
  explicit SuffixIndex(std::int64_t most_tokens) : most_tokens_(most_tokens) {}

  // Begins a response; returns its number.
  std::int64_t open(const Tokens& prompt);

  void extend(std::int64_t response, const Tokens& added);

  // At most `count` tokens that may follow a response: those at the place that follows the most of its last tokens, two
  // at least and 32 at most; of equal ones the latest. Of places that follow its last two, the latest 64 are looked at.
  // Where the text of a place ends, the next place is looked for.
  Tokens continuation(std::int64_t response, std::int64_t count) const;

  // No more tokens come. Those of before stay.
  void close(std::int64_t response);

 private:
  // A token of a text: of the prompt, which is the first one, or of a response to it.
  struct Place {
    std::int32_t text;
    std::int32_t index;
  };
  struct Text {
    Tokens tokens;
    std::vector<Place> earlier;  // for each token, the latest place before it that follows the same two
  };
  struct Prompt {
    std::vector<Text> texts;
    std::unordered_map<std::uint64_t, Place> latest;  // place that follows two tokens
    std::int64_t num_tokens = 0;
    std::int64_t num_open = 0;
  };
  using Prompts = std::map<Tokens, Prompt>;
  struct Response {
    Prompts::iterator prompt;
    std::int32_t text;
  };

  static Tokens end_of(const Prompt& prompt, std::int32_t text);
  static std::int64_t agreement(const Prompt& prompt, Place place, const Tokens& written);
  static Place find(const Prompt& prompt, const Tokens& written);
  void append(Prompt& prompt, std::int32_t text, const Tokens& tokens);

  std::int64_t most_tokens_;
  std::int64_t num_tokens_ = 0;
  std::int64_t next_response_ = 0;
  Prompts prompts_;
  std::unordered_map<std::int64_t, Response> responses_;  // open ones
  std::list<Prompts::iterator> closed_;                   // without open ones, the longest ago first
};

}  // namespace fuse
