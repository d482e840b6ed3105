from vitreous.text import escape_text


def test_what_cannot_be_seen_is_written_out():
    assert escape_text("plain ü 漢.png") == "plain ü 漢.png"
    assert escape_text("a\nb\x1b[31m\u202e\udc80") == "a\\nb\\x1b[31m\\u202e\\udc80"
