#!/usr/bin/env python3
"""Write a seeded corpus of mail messages for measuring content filters.

usage: make_corpus.py OUTDIR [--count 400] [--seed 1] [--max-size 10485760]

Every message is one file OUTDIR/NNNN-KIND.eml with LF line ends, the form in
which qmail-smtpd hands a message to qmail-queue (descriptor 0).  The same seed
gives the same bytes.  OUTDIR/manifest.tsv lists: file, size, kind, expected.

Sizes follow a log-normal distribution (median about 8 KB) with a forced tail up
to --max-size.  Kinds and their shares:

  text   33 %  text/plain, 7bit or quoted-printable or 8bit
  html   33 %  multipart/alternative, text + HTML
  att    22 %  multipart/mixed, 1..4 base64 attachments: ZIP, DOCX-like ZIP,
               PDF, PNG, JPEG-like, CSV
  image   3 %  multipart/related, HTML with inline PNGs
  nested  2 %  message/rfc822 forwarded inside multipart/mixed
  exe     3 %  an MZ/PE-like executable in base64 (some named .pdf, some in a ZIP)
  eicar   2 %  the EICAR test pattern (plain, base64, in a ZIP, in a forward)
  gtube   2 %  the GTUBE test pattern (text, HTML)

expected is one of: clean, exe, eicar, gtube.
The two test patterns are split in this file so that no scanner detects it.
"""

import argparse
import base64
import io
import math
import os
import quopri
import random
import struct
import sys
import zipfile
import zlib

EICAR = "X5O!P%@AP[4\\PZX54(P^)7CC)7}$" + "EICAR-STANDARD-" + "ANTIVIRUS-TEST-" + "FILE!$H+H*"
GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*" + "GTUBE-STANDARD-" + "ANTI-UBE-TEST-" + "EMAIL*C.34X"

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were all her she there would their we him been has when who will no more if out so up "
    "said what its about than into them can only other time new some could these two may first then do any like "
    "my now over such our man me even most made after also did many off before must well back through years much "
    "where your way down should because long each just state those people too mister how little good world make "
    "very year still see own work men day get here old life both between being under three never know same last "
    "another while us might great go come since against right came take used himself few house american use place "
    "during high without again home around small however found mrs part school thought went say general once upon "
    "invoice meeting project report attached please regards budget schedule customer delivery contract question "
    "answer server network update release review agenda minutes quarter sales order number address phone office "
    "travel hotel booking confirm account password support ticket request response document draft final version "
    "lehet nem igen levél üzenet kérem köszönöm holnap tegnap ajánlat számla határidő könyv ház víz idő ember "
    "grüße bitte danke rechnung besprechung anhang büro straße über für möglich natürlich année merci prière "
    "réunion projet délai réponse été déjà où garçon"
).split()

HOSTS = ["mail.example.org", "smtp.example.net", "mx1.example.com", "out.example.edu", "relay.example.info"]
NAMES = [
    "Anna Kovacs",
    "Bela Nagy",
    "John Smith",
    "Maria Garcia",
    "Wei Chen",
    "Olga Ivanova",
    "Peter Szabo",
    "Sara Lind",
    "Tom Baker",
    "Uwe Mueller",
    "Yuki Tanaka",
    "Zoltan Toth",
]


class Maker:
    def __init__(self, seed):
        self.r = random.Random(seed)
        self.n = 0

    # ---- building blocks -------------------------------------------------

    def words(self, k):
        return " ".join(self.r.choice(WORDS) for _ in range(k))

    def prose(self, size):
        """About `size` characters of wrapped text."""
        out, have = [], 0
        while have < size:
            line, n = [], 0
            limit = self.r.randint(55, 75)
            while n < limit:
                w = self.r.choice(WORDS)
                line.append(w)
                n += len(w) + 1
            s = " ".join(line)
            x = self.r.random()
            if x < 0.10:
                s = s.capitalize() + ".\n"
            elif x < 0.16:
                s = "> " + s
            elif x < 0.18:
                s += " https://www.%s/%s?id=%d" % (
                    self.r.choice(HOSTS),
                    self.r.choice(WORDS[:60]),
                    self.r.randint(1, 10**6),
                )
            out.append(s)
            have += len(s) + 1
        return "\n".join(out) + "\n"

    def html(self, size):
        out = [
            '<!DOCTYPE html><html><head><meta charset="utf-8"><title>%s</title><style>p{margin:0 0 1em}'
            'td{font-family:Arial,sans-serif;font-size:14px}</style></head><body><table width="600">' % self.words(4)
        ]
        have = len(out[0])
        while have < size:
            s = '<tr><td style="padding:%dpx;color:#%06x"><p>%s</p><a href="https://www.%s/c/%d">%s</a></td></tr>' % (
                self.r.randint(0, 30),
                self.r.randint(0, 0xFFFFFF),
                self.words(self.r.randint(8, 30)),
                self.r.choice(HOSTS),
                self.r.randint(1, 10**8),
                self.words(2),
            )
            out.append(s)
            have += len(s) + 1
        out.append("</table></body></html>")
        return "\n".join(out) + "\n"

    def noise(self, size):
        return self.r.randbytes(max(0, size))

    def png(self, size):
        def chunk(t, d):
            return struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))

        w = max(8, int(math.sqrt(size / 3)))
        h = max(1, size // (3 * w + 1))
        raw = b"".join(b"\0" + self.noise(3 * w) for _ in range(h))
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(raw, 1))
            + chunk(b"IEND", b"")
        )

    def jpeg(self, size):
        body = self.noise(size).replace(b"\xff", b"\xfe")
        return (
            b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
            + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"
            + body
            + b"\xff\xd9"
        )

    def pdf(self, size):
        out = io.BytesIO()
        out.write(b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n")
        offs, have, k = [], 0, 1
        offs.append(out.tell())
        out.write(b"1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n")
        offs.append(out.tell())
        out.write(b"2 0 obj\n<</Type/Pages/Kids[]/Count 0>>\nendobj\n")
        k = 3
        while have < size:
            part = min(size - have, self.r.randint(2000, 40000))
            if self.r.random() < 0.5:
                data = zlib.compress(self.prose(part * 2).encode(), 6)
            else:
                data = zlib.compress(self.noise(part), 1)
            offs.append(out.tell())
            out.write(b"%d 0 obj\n<</Length %d/Filter/FlateDecode>>\nstream\n" % (k, len(data)))
            out.write(data)
            out.write(b"\nendstream\nendobj\n")
            have += max(1, len(data))
            k += 1
        x = out.tell()
        out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(offs) + 1))
        for o in offs:
            out.write(b"%010d 00000 n \n" % o)
        out.write(b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(offs) + 1, x))
        return out.getvalue()

    def zip(self, members):
        b = io.BytesIO()
        with zipfile.ZipFile(b, "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in members:
                i = zipfile.ZipInfo(name, date_time=(2024, 1, 1, 0, 0, 0))
                i.compress_type = zipfile.ZIP_DEFLATED
                z.writestr(i, data)
        return b.getvalue()

    def anyzip(self, size):
        k = self.r.randint(1, 5)
        m = []
        for i in range(k):
            if self.r.random() < 0.5:
                m.append(("f%d.txt" % i, self.prose(2 * size // k).encode()))
            else:
                m.append(("f%d.bin" % i, self.noise(size // k)))
        return self.zip(m)

    def docx(self, size):
        return self.zip(
            [
                ("[Content_Types].xml", b'<?xml version="1.0"?><Types/>'),
                ("_rels/.rels", b'<?xml version="1.0"?><Relationships/>'),
                ("word/document.xml", ('<?xml version="1.0"?><w:document>%s</w:document>' % self.prose(size)).encode()),
                ("word/media/image1.png", self.png(size * 2 // 3)),
            ]
        )

    def csv(self, size):
        out, have = [], 0
        while have < size:
            s = "%d;%s;%.2f;%s" % (
                self.r.randint(1, 10**6),
                self.r.choice(WORDS),
                self.r.random() * 1000,
                self.r.choice(NAMES),
            )
            out.append(s)
            have += len(s) + 1
        return ("\n".join(out) + "\n").encode()

    def exe(self, size):
        """Bytes that begin like a Windows executable (MZ, DOS stub, PE header) but cannot run."""
        dos = (
            b"MZ\x90\x00\x03\x00\x00\x00\x04\x00\x00\x00\xff\xff\x00\x00\xb8\x00\x00\x00\x00\x00\x00\x00@\x00".ljust(
                60, b"\0"
            )
            + struct.pack("<I", 128)
            + b"\x0e\x1f\xba\x0e\x00\xb4\t\xcd!\xb8\x01L\xcd!This program cannot be run in DOS mode.\r\r\n$".ljust(
                64, b"\0"
            )
        )
        pe = b"PE\0\0" + struct.pack("<HHIIIHH", 0x14C, 3, 0x5F000000, 0, 0, 224, 0x102) + b"\x0b\x01".ljust(224, b"\0")
        sect = b"".join(
            n.ljust(8, b"\0")
            + struct.pack("<IIIIIIHHI", 0x1000, 0x1000 * (i + 1), 0x200, 0x400, 0, 0, 0, 0, 0x60000020)
            for i, n in enumerate((b".text", b".data", b".rsrc"))
        )
        head = (dos + pe + sect).ljust(1024, b"\0")
        return head + self.noise(max(0, size - len(head)))

    # ---- a message -------------------------------------------------------

    def addr(self):
        n = self.r.choice(NAMES)
        return '"%s" <%s@%s>' % (n, n.lower().replace(" ", "."), self.r.choice(HOSTS).split(".", 1)[1])

    def head(self, subject=None):
        self.n += 1
        r = self.r
        day = r.randint(1, 28)
        date = "Mon, %d Jan 2024 %02d:%02d:%02d +0000" % (day, r.randint(0, 23), r.randint(0, 59), r.randint(0, 59))
        out = ["Return-Path: <%s@%s>" % (r.choice(WORDS[:50]), "example.org")]
        for _ in range(r.randint(1, 4)):
            out.append(
                "Received: from %s (%s [192.0.2.%d])\n\tby %s (Postfix) with ESMTPS id %010X\n\tfor "
                "<user@bench.example>; %s"
                % (r.choice(HOSTS), r.choice(HOSTS), r.randint(1, 254), r.choice(HOSTS), r.getrandbits(40), date)
            )
        if r.random() < 0.6:
            sig = base64.b64encode(self.noise(128)).decode()
            out.append(
                "DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d=example.org; s=sel;\n\t"
                "h=from:to:subject:date:message-id; bh=%s;\n\tb=%s"
                % (
                    base64.b64encode(self.noise(32)).decode(),
                    "\n\t ".join(sig[i : i + 64] for i in range(0, len(sig), 64)),
                )
            )
        out.append("From: " + self.addr())
        out.append("To: <user@bench.example>")
        out.append("Subject: " + (subject or self.words(r.randint(2, 9)).encode("ascii", "ignore").decode()))
        out.append("Date: " + date)
        out.append("Message-ID: <%016x.%d@%s>" % (r.getrandbits(64), self.n, r.choice(HOSTS)))
        out.append("MIME-Version: 1.0")
        return "\n".join(out) + "\n"

    def boundary(self):
        return "----=_Part_%d_%08x" % (self.n, self.r.getrandbits(32))

    def textpart(self, text, sub="plain"):
        how = self.r.random()
        if how < 0.45:
            b = quopri.encodestring(text.encode(), quotetabs=False).decode("ascii")
            return "Content-Type: text/%s; charset=UTF-8\nContent-Transfer-Encoding: quoted-printable\n\n%s" % (sub, b)
        if how < 0.8:
            return "Content-Type: text/%s; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n%s" % (sub, text)
        if how < 0.92:
            return "Content-Type: text/%s; charset=us-ascii\nContent-Transfer-Encoding: 7bit\n\n%s" % (
                sub,
                text.encode("ascii", "ignore").decode(),
            )
        return "Content-Type: text/%s; charset=UTF-8\nContent-Transfer-Encoding: base64\n\n%s" % (
            sub,
            base64.encodebytes(text.encode()).decode(),
        )

    def b64part(self, name, ctype, data, disp="attachment", cid=None):
        return (
            'Content-Type: %s; name="%s"\nContent-Transfer-Encoding: base64\n%sContent-Disposition: %s; '
            'filename="%s"\n\n%s'
            % (ctype, name, "Content-ID: <%s>\n" % cid if cid else "", disp, name, base64.encodebytes(data).decode())
        )

    def multi(self, sub, parts):
        b = self.boundary()
        body = "".join("--%s\n%s\n" % (b, p) for p in parts)
        return (
            'Content-Type: multipart/%s; boundary="%s"\n\nThis is a multi-part message in MIME format.\n%s--%s--\n'
            % (sub, b, body, b)
        )

    def alternative(self, size):
        t = max(200, size // 4)
        return self.multi(
            "alternative", [self.textpart(self.prose(t)), self.textpart(self.html(max(300, size - t)), "html")]
        )

    def attachment(self, size):
        raw = max(400, size * 3 // 4)
        kind = self.r.choice(["zip", "docx", "pdf", "pdf", "png", "jpeg", "csv"])
        base = self.r.choice(WORDS[:200]).encode("ascii", "ignore").decode() or "file"
        if kind == "zip":
            return self.b64part(base + ".zip", "application/zip", self.anyzip(raw))
        if kind == "docx":
            return self.b64part(
                base + ".docx",
                "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
                self.docx(raw),
            )
        if kind == "pdf":
            return self.b64part(base + ".pdf", "application/pdf", self.pdf(raw))
        if kind == "png":
            return self.b64part(base + ".png", "image/png", self.png(raw))
        if kind == "jpeg":
            return self.b64part(base + ".jpg", "image/jpeg", self.jpeg(raw))
        return self.b64part(base + ".csv", "text/csv", self.csv(raw))

    def message(self, kind, size):
        r = self.r
        h = self.head("Test of the filter" if kind in ("eicar", "gtube") else None)
        room = max(300, size - len(h))
        if kind == "text":
            return h + self.textpart(self.prose(room))
        if kind == "html":
            return h + self.alternative(room)
        if kind == "image":
            k = r.randint(1, 4)
            each = max(300, room * 2 // 3 // k)
            parts = [self.textpart(self.html(max(300, room // 3)), "html")]
            parts += [
                self.b64part("img%d.png" % i, "image/png", self.png(each * 3 // 4), "inline", "i%d@x" % i)
                for i in range(k)
            ]
            return h + self.multi("related", parts)
        if kind == "att":
            k = r.choice([1, 1, 1, 2, 2, 3, 4])
            t = min(room // 4, 4000)
            parts = [self.alternative(t) if r.random() < 0.6 else self.textpart(self.prose(t))]
            parts += [self.attachment(max(400, (room - t) // k)) for _ in range(k)]
            return h + self.multi("mixed", parts)
        if kind == "nested":
            inner = self.message(r.choice(["text", "html", "att"]), room * 3 // 4)
            return h + self.multi(
                "mixed", [self.textpart(self.prose(room // 5)), "Content-Type: message/rfc822\n\n" + inner]
            )
        if kind == "exe":
            data = self.exe(max(2000, room * 3 // 4))
            x = r.random()
            if x < 0.5:
                p = self.b64part("setup.exe", "application/x-msdownload", data)
            elif x < 0.75:
                p = self.b64part("invoice.pdf", "application/pdf", data)
            else:
                p = self.b64part("invoice.zip", "application/zip", self.zip([("invoice.exe", data)]))
            return h + self.multi("mixed", [self.textpart(self.prose(600)), p])
        if kind == "eicar":
            e = EICAR.encode()
            x = self.n % 4
            if x == 0:
                p = self.b64part("eicar.com", "application/octet-stream", e)
            elif x == 1:
                p = self.b64part("eicar.zip", "application/zip", self.zip([("eicar.com", e)]))
            elif x == 2:
                p = (
                    'Content-Type: text/plain; name="eicar.txt"\nContent-Disposition: attachment; '
                    'filename="eicar.txt"\n\n' + EICAR + "\n"
                )
            else:
                p = (
                    "Content-Type: message/rfc822\n\n"
                    + self.head()
                    + self.multi(
                        "mixed",
                        [self.textpart(self.prose(500)), self.b64part("eicar.com", "application/octet-stream", e)],
                    )
                )
            return h + self.multi("mixed", [self.textpart(self.prose(max(300, room - 2000))), p])
        if kind == "gtube":
            if self.n % 2:
                return (
                    h
                    + "Content-Type: text/plain; charset=us-ascii\n\n"
                    + self.prose(room // 2).encode("ascii", "ignore").decode()
                    + GTUBE
                    + "\n"
                    + self.prose(room // 2).encode("ascii", "ignore").decode()
                )
            return h + self.multi(
                "alternative",
                [
                    "Content-Type: text/plain; charset=us-ascii\n\n"
                    + self.words(20).encode("ascii", "ignore").decode()
                    + "\n"
                    + GTUBE
                    + "\n",
                    "Content-Type: text/html; charset=us-ascii\n\n<html><body><p>%s</p></body></html>\n" % GTUBE,
                ],
            )
        raise ValueError(kind)


def plan(r, count, maxsize):
    share = [
        ("text", 0.33),
        ("html", 0.33),
        ("att", 0.22),
        ("image", 0.03),
        ("nested", 0.02),
        ("exe", 0.03),
        ("eicar", 0.02),
        ("gtube", 0.02),
    ]
    kinds = []
    for k, s in share:
        kinds += [k] * round(count * s)
    while len(kinds) < count:
        kinds.append("text")
    kinds = kinds[:count]
    # sizes: text and HTML small, attachments large; together the median is near 8 KB
    centre = {
        "text": 3200,
        "html": 7000,
        "att": 60000,
        "image": 40000,
        "nested": 20000,
        "exe": 60000,
        "eicar": 5000,
        "gtube": 3000,
    }
    sigma = {"text": 0.9, "html": 0.9, "att": 1.4, "image": 1.1, "nested": 1.0, "exe": 1.0, "eicar": 0.6, "gtube": 0.5}
    out = [[k, int(min(maxsize * 0.45, max(700, centre[k] * math.exp(r.gauss(0, sigma[k])))))] for k in kinds]
    tail = [i for i, (k, _) in enumerate(out) if k == "att"]
    for i, f in zip(tail, (1.0, 0.5, 0.3, 0.2)):
        out[i][1] = int(maxsize * f * 0.97)
    r.shuffle(out)
    return out


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("outdir")
    a.add_argument("--count", type=int, default=400)
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--max-size", type=int, default=10 * 1024 * 1024)
    o = a.parse_args()
    os.makedirs(o.outdir, exist_ok=True)
    m = Maker(o.seed)
    sizes, rows = [], []
    for i, (kind, size) in enumerate(plan(random.Random(o.seed + 1), o.count, o.max_size)):
        data = m.message(kind, size).encode("utf-8")
        name = "%04d-%s.eml" % (i, kind)
        with open(os.path.join(o.outdir, name), "wb") as f:
            f.write(data)
        sizes.append(len(data))
        rows.append(
            "%s\t%d\t%s\t%s\n" % (name, len(data), kind, kind if kind in ("exe", "eicar", "gtube") else "clean")
        )
    with open(os.path.join(o.outdir, "manifest.tsv"), "w") as f:
        f.writelines(rows)
    s = sorted(sizes)
    print(
        "%d messages, %d bytes in all, median %d, mean %d, p90 %d, p99 %d, max %d"
        % (len(s), sum(s), s[len(s) // 2], sum(s) // len(s), s[int(len(s) * 0.9)], s[int(len(s) * 0.99)], s[-1])
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
