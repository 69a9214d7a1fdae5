// What a row sees of a block: slots below `sink` or from `near` on, of those below `end`.
struct Seen {
    float sink, near, end;
};
