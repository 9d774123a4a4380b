"""One guarded call, round by round: what was asked, the loop, and what becomes of its tokens."""
