#include "text/suffix_index.h"

#include <algorithm>
#include <utility>

namespace fuse {
namespace {

constexpr std::int64_t kLongest = 32;  // tokens that are compared
constexpr int kMostPlaces = 64;
constexpr std::int32_t kNowhere = -1;  // in place of a text

std::uint64_t key_of(SuffixIndex::Token first, SuffixIndex::Token second) {
  return static_cast<std::uint64_t>(first) << 32 | static_cast<std::uint32_t>(second);
}

std::int64_t size_of(const SuffixIndex::Tokens& tokens) { return static_cast<std::int64_t>(tokens.size()); }

}  // namespace

std::int64_t SuffixIndex::open(const Tokens& prompt) {
  const auto [found, is_new] = prompts_.try_emplace(prompt);
  Prompt& own = found->second;
  if (is_new) {
    own.texts.emplace_back();
    append(own, 0, prompt);
  } else if (own.num_open == 0) {
    closed_.remove(found);
  }
  ++own.num_open;
  own.texts.emplace_back();
  responses_.emplace(next_response_, Response{found, static_cast<std::int32_t>(own.texts.size() - 1)});
  return next_response_++;
}

void SuffixIndex::extend(std::int64_t response, const Tokens& added) {
  const Response& own = responses_.at(response);
  append(own.prompt->second, own.text, added);
}

SuffixIndex::Tokens SuffixIndex::continuation(std::int64_t response, std::int64_t count) const {
  const Response& own = responses_.at(response);
  const Prompt& prompt = own.prompt->second;
  Tokens written = end_of(prompt, own.text);
  const std::int64_t start = size_of(written);
  while (size_of(written) < start + count) {
    const Place place = find(prompt, written);
    if (place.text == kNowhere) break;
    const Tokens& tokens = prompt.texts[place.text].tokens;
    const std::int64_t copied = std::min(size_of(tokens) - place.index, start + count - size_of(written));
    written.insert(written.end(), tokens.begin() + place.index, tokens.begin() + place.index + copied);
  }
  return Tokens(written.begin() + start, written.end());
}

void SuffixIndex::close(std::int64_t response) {
  const Prompts::iterator prompt = responses_.at(response).prompt;
  responses_.erase(response);
  if (--prompt->second.num_open > 0) return;
  closed_.push_back(prompt);
  while (num_tokens_ > most_tokens_ && !closed_.empty()) {
    num_tokens_ -= closed_.front()->second.num_tokens;
    prompts_.erase(closed_.front());
    closed_.pop_front();
  }
}

// The last tokens of a text, those of the prompt before it included.
SuffixIndex::Tokens SuffixIndex::end_of(const Prompt& prompt, std::int32_t text) {
  const Tokens& tokens = prompt.texts[text].tokens;
  const std::int64_t own = std::min(kLongest, size_of(tokens));
  Tokens end;
  if (text > 0) {
    const Tokens& first = prompt.texts[0].tokens;
    end.assign(first.end() - std::min(kLongest - own, size_of(first)), first.end());
  }
  end.insert(end.end(), tokens.end() - own, tokens.end());
  return end;
}

// How many tokens before a place are those that were written last.
std::int64_t SuffixIndex::agreement(const Prompt& prompt, Place place, const Tokens& written) {
  const Tokens& before = prompt.texts[0].tokens;
  const Tokens& tokens = prompt.texts[place.text].tokens;
  const std::int64_t num_before = place.text > 0 ? size_of(before) : 0;
  const std::int64_t most = std::min({kLongest, size_of(written), num_before + place.index});
  std::int64_t count = 0;
  while (count < most) {
    const std::int64_t index = place.index - 1 - count;
    const Token token = index >= 0 ? tokens[index] : before[num_before + index];
    if (token != written[written.size() - 1 - count]) break;
    ++count;
  }
  return count;
}

SuffixIndex::Place SuffixIndex::find(const Prompt& prompt, const Tokens& written) {
  Place best{kNowhere, 0};
  if (written.size() < 2) return best;
  const auto latest = prompt.latest.find(key_of(written[written.size() - 2], written.back()));
  if (latest == prompt.latest.end()) return best;
  std::int64_t longest = 0;
  Place place = latest->second;
  for (int tried = 0; tried < kMostPlaces && place.text != kNowhere && longest < kLongest; ++tried) {
    const std::int64_t length = agreement(prompt, place, written);
    if (length > longest) {
      longest = length;
      best = place;
    }
    place = prompt.texts[place.text].earlier[place.index];
  }
  return best;
}

void SuffixIndex::append(Prompt& prompt, std::int32_t text, const Tokens& tokens) {
  Tokens before = end_of(prompt, text);
  Text& own = prompt.texts[text];
  for (const Token token : tokens) {
    const Place place{text, static_cast<std::int32_t>(own.tokens.size())};
    Place earlier{kNowhere, 0};
    if (before.size() >= 2) {
      const auto [latest, is_first] =
          prompt.latest.try_emplace(key_of(before[before.size() - 2], before.back()), place);
      if (!is_first) earlier = std::exchange(latest->second, place);
    }
    own.earlier.push_back(earlier);
    own.tokens.push_back(token);
    before.push_back(token);
  }
  prompt.num_tokens += size_of(tokens);
  num_tokens_ += size_of(tokens);
}

}  // namespace fuse
