"""Made-up personal data, duplicates and leaks in realistic English and Chinese text, with the truth beside them.

Check digits are computed here by other methods than in `rlhf.data.cleaning`, so that a shared mistake shows.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

SENTENCES_EN = [
    "The parcel arrived two days late and the box was open.",
    "I have been using this phone since 2019-03-14 without a single problem.",
    "Version 10.2.3.4 of the driver fixed the crash on my laptop.",
    "We paid $1,234.56 for four nights, breakfast included.",
    "Please run pip install numpy==1.26.4 before you start.",
    "The answer is 3.14159265358979 to fourteen places.",
    "Add 12345678901 and 98765432109, then divide by 1000000007.",
    "Order number 4111111111111111 was shipped on 12/24/2021 at 12:30:45.",
    "The timestamp 1699999999999 is in milliseconds.",
    "Chapter 1.2.3.4 explains the proof; see also section 2.7.1.",
    "ISBN 978-3-16-148410-0 is out of print.",
    "Chrome/119.0.0.0 Safari/537.36 was the user agent.",
    "He scored 200-300 points in 1999-2000 and 555 in 2004.",
    "Use @app.route or @pytest.mark.slow above the function.",
    "Clone git@github.com:someone/project.git and open icon@2x.png.",
    "The mask is 255.255.255.0 and the gateway 192.168.1.1.",
    "std::vector<int> v; v.push_back(2001); // dead::beef",
    "The population grew from 1380013800 to 14000000000 in the model.",
    "Compute (x + 12345678901) * 3 = y for the given input.",
    "The class is named sk-fading-circle-container-wrapper in the sheet.",
    "The commit 9fceb02d0ae598e95dc970b74767f19372d61af8 broke the build.",
    "UUID 123e4567-e89b-12d3-a456-426614174000 is the example of the standard.",
    "Ticket 123-45-67890 was closed yesterday.",
    "The part no. 123-45-6789 is sold out.",
    "It has 640x480 pixels and weighs 1.5e10 units.",
    "Nobody knew what to do, so we waited for the next train.",
    "Mix 250 g of flour with 120 ml of milk and rest for 30 minutes.",
    "The equation 2 + 2 = 4 holds, and 7 * 6 = 42 as well.",
]
SENTENCES_ZH = [
    "今天天气很好，我们一起去公园散步吧。",
    "这本书出版于2019年3月14日，售价58.00元。",
    "软件版本1.2.3.4修复了上个月的问题。",
    "订单号13912345678已经发货，请耐心等待。",
    "快递单号：6222021234567890128，预计明天送达。",
    "圆周率约等于3.14159265358979。",
    "公司去年的营收达到13800138000元。",
    "请计算12345678901加98765432109的结果。",
    "会议时间是2023-10-15 14:30:00，请准时参加。",
    "学生编号20230101001的成绩是98.5分。",
    "他在1998-2003年间担任主任。",
    "比例是16:9，分辨率是1920x1080。",
    "请把子网掩码设为255.255.255.0，网关设为192.168.1.1。",
    "全国人口约14.1亿，增长率为0.34%。",
    "这道题的答案是(3+4)*5=35。",
    "第3.2.1.4节介绍了证明方法。",
    "我不知道该怎么办，只好等下一班车。",
    "把250克面粉和120毫升牛奶混合，静置30分钟。",
    "时间戳1699999999999以毫秒为单位。",
    "型号4111111111111111的零件已经停产。",
]
# {} takes the value.
FRAMES: dict[str, list[str]] = {
    "EMAIL": [
        "Write to {} today.",
        "My address is <{}>, thanks.",
        "邮箱：{}。",
        "请发到{}，谢谢",
        "mailto:{}",
        "Email:{}",
    ],
    "PHONE": [
        "Call me at {} after six.",
        "Phone: {}.",
        "(tel {})",
        "电话：{}，找王先生。",
        "请拨打{}联系我们",
        "我的手机是{}。",
    ],
    "CN_ID": ["身份证号：{}。", "我的身份证号码是{}，请核对", "Her ID is {}.", "（{}）"],
    "BANK_CARD": ["Card {} expires in May.", "Pay with {}, please.", "银行卡号：{}。", "我的卡是{}，请查收"],
    "SSN": ["SSN: {}.", "My social security number is {}, right?", "社会安全号{}。", "({})"],
    "IBAN": ["IBAN: {}.", "Send it to {}, please.", "请汇到{}。", "Account {} BIC follows"],
    "IPV4": [
        "Login from {} failed.",
        "ssh root@host # {}",
        "服务器地址是{}。",
        "http://{}:8080/path",
        "IP：{}，端口80",
    ],
    "IPV6": ["ping {} works.", "地址是{}。", "Host [{}] answered", "It came from {}, I think."],
    "API_KEY": ["key = {}", "export TOKEN={}", '"api_key": "{}",', "我的密钥是{}。", "Use {} for tests."],
    "PRIVATE_KEY": ["Here it is:\n{}\nKeep it safe.", "密钥如下：\n{}"],
}
_GIVEN = ["anna", "li.wei", "john_smith", "zhang.san", "mei-ling", "o.brien", "wang88", "k", "maria.garcia+news"]
_HOSTS = ["gmail.com", "qq.com", "163.com", "uni-bonn.de", "mail.company.co.uk", "example.org", "t-online.de"]


def luhn_append(body: str) -> str:
    """`body` and its check digit, by trying all ten with the table of doubled digits."""
    doubled = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    for check in string.digits:
        number = (body + check)[::-1]
        if sum(doubled[int(d)] if at % 2 else int(d) for at, d in enumerate(number)) % 10 == 0:
            return body + check
    raise AssertionError


def cn_id(rng: random.Random) -> str:
    """A resident number; its check character by the recursion of ISO 7064 MOD 11-2."""
    area = rng.choice(["110105", "310104", "440305", "510107", "320106", "650102"])
    body = f"{area}{rng.randint(1940, 2012)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}{rng.randint(1, 999):03}"
    p = 0
    for digit in body:
        p = (p + int(digit)) * 2 % 11
    check = (12 - p) % 11
    return body + ("X" if check == 10 else str(check))


def iban(rng: random.Random) -> str:
    """An IBAN, grouped or not; check digits as 98 - (number mod 97)."""
    country, bban = rng.choice(
        [
            ("DE", "".join(rng.choices(string.digits, k=18))),
            ("GB", rng.choice(["WEST", "BARC", "NWBK"]) + "".join(rng.choices(string.digits, k=14))),
            ("FR", "".join(rng.choices(string.digits, k=23))),
            ("NL", "ABNA" + "".join(rng.choices(string.digits, k=10))),
            ("NO", "".join(rng.choices(string.digits, k=11))),
        ]
    )
    letters = "".join(str(ord(c) - 55) if c.isalpha() else c for c in bban + country + "00")
    value = f"{country}{98 - int(letters) % 97:02}{bban}"
    grouped = " ".join(value[start : start + 4] for start in range(0, len(value), 4))
    return rng.choice([value, grouped])


def email(rng: random.Random) -> str:
    """An e-mail address."""
    return f"{rng.choice(_GIVEN)}{rng.choice(['', '7', '1990'])}@{rng.choice(_HOSTS)}"


def _n(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits[1:], k=count))


def phone(rng: random.Random) -> str:
    """A phone number of China, the USA or elsewhere, in a usual way of writing."""
    mobile = rng.choice(["138", "159", "177", "186", "199", "130", "150"])
    a, b, us = _n(rng, 4), _n(rng, 4), f"{rng.choice('23456789')}{rng.choice('02345')}{rng.choice('123456789')}"
    exchange = f"{rng.choice('2345')}{rng.choice('0456')}{rng.choice('789')}"
    return rng.choice(
        [
            *(f"{mobile}{a}{b}", f"{mobile} {a} {b}", f"{mobile}-{a}-{b}", f"+86 {mobile}{a}{b}", f"+86{mobile}{a}{b}"),
            *(f"010-6{_n(rng, 7)}", f"0755-8{_n(rng, 7)}", f"(021) 5{_n(rng, 7)}", f"+86 10 6{_n(rng, 7)}"),
            *(f"({us}) {exchange}-{a}", f"{us}-{exchange}-{a}", f"+1 {us}-{exchange}-{a}", f"{us}.{exchange}.{a}"),
            *(
                f"+44 20 7{_n(rng, 3)} {a}",
                f"+49 30 {_n(rng, 8)}",
                f"+33 1 {_n(rng, 2)} {_n(rng, 2)} {_n(rng, 2)} {_n(rng, 2)}",
            ),
            *(
                f"+81-3-{a}-{b}",
                f"+61 4{_n(rng, 2)} {_n(rng, 3)} {_n(rng, 3)}",
                f"+4915{_n(rng, 9)}",
                f"+919{_n(rng, 9)}",
            ),
        ]
    )


def card(rng: random.Random) -> str:
    """A bank card number: Visa, Mastercard, UnionPay or American Express."""
    body = rng.choice(
        ["4" + _n(rng, 14), f"5{rng.randint(1, 5)}" + _n(rng, 13), "6222" + _n(rng, 14), "37" + _n(rng, 12)]
    )
    number = luhn_append(body)
    if len(number) == 16:
        groups = [number[start : start + 4] for start in range(0, 16, 4)]
        return rng.choice([number, " ".join(groups), "-".join(groups)])
    return number


def ssn(rng: random.Random) -> str:
    """A US social security number."""
    return (
        f"{rng.choice([rng.randint(100, 665), rng.randint(667, 899)])}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"
    )


def ipv4(rng: random.Random) -> str:
    """A public IPv4 address."""
    first = rng.choice([23, 45, 101, 123, 185, 203, 220])
    return f"{first}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}"


def ipv6(rng: random.Random) -> str:
    """A global IPv6 address, full or shortened."""
    part = [f"{rng.randint(1, 65535):x}" for _ in range(8)]
    head = rng.choice(["2001:db8", "2a02:6b8", "240e:3a1", "2607:f8b0"])
    return rng.choice([f"{head}:{':'.join(part[:6])}", f"{head}::{part[0]}", f"{head}:{part[0]}::{part[1]}:{part[2]}"])


def api_key(rng: random.Random) -> str:
    """A key of a known service, or a JWT."""

    def some(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
        return "a1B2c3" + "".join(rng.choices(alphabet, k=count - 6))

    return rng.choice(
        [
            *("AKIA" + some(16, string.ascii_uppercase + string.digits).upper(), "ghp_" + some(36), "sk-" + some(48)),
            *("sk-proj-" + some(60), "hf_" + some(34), "AIza" + some(35), "github_pat_" + some(22) + "_" + some(59)),
            f"eyJhbGciOiJIUzI1NiJ9.eyJ{some(40)}.{some(43)}",
        ]
    )


def private_key(rng: random.Random) -> str:
    """A PEM block."""
    name = rng.choice(["RSA ", "EC ", "", "OPENSSH "])
    lines = ["".join(rng.choices(string.ascii_letters + string.digits + "+/", k=64)) for _ in range(4)]
    return "\n".join([f"-----BEGIN {name}PRIVATE KEY-----", *lines, f"-----END {name}PRIVATE KEY-----"])


MAKERS: dict[str, Callable[[random.Random], str]] = {
    "EMAIL": email,
    "PHONE": phone,
    "CN_ID": cn_id,
    "BANK_CARD": card,
    "SSN": ssn,
    "IBAN": iban,
    "IPV4": ipv4,
    "IPV6": ipv6,
    "API_KEY": api_key,
    "PRIVATE_KEY": private_key,
}


@dataclass(frozen=True)
class Planted:
    """A text and what stands in it: (kind, start, end)."""

    text: str
    spans: list[tuple[str, int, int]]


def pii_texts(kind: str, count: int, seed: int) -> list[Planted]:
    """`count` texts of a few ordinary sentences with hard negatives; each holds one value of `kind`."""
    rng = random.Random(f"{kind} {seed}")
    out = []
    for _ in range(count):
        frame, value = rng.choice(FRAMES[kind]), MAKERS[kind](rng)
        chinese = not frame.isascii()
        sentences = SENTENCES_ZH if chinese else SENTENCES_EN
        before, after = rng.sample(sentences, 2)
        glue = rng.choice(["", "\n"]) if chinese else rng.choice([" ", "\n"])
        head, tail = frame.split("{}")
        start = len(before + glue + head)
        out.append(Planted(before + glue + head + value + tail + glue + after, [(kind, start, start + len(value))]))
    return out


def words(text: str) -> list[str]:
    """The words of a list."""
    return text.split()


def paragraph(rng: random.Random, chinese: bool) -> str:
    """A text of made-up facts that no other call makes: about 60 words or 120 characters."""
    if chinese:
        people, verbs = (
            "王李张刘陈杨赵黄周吴徐孙",
            ["修好了", "买下了", "画过", "弄丢了", "研究", "讨厌", "收藏", "谈起"],
        )
        things = [
            "旧自行车",
            "木头桌子",
            "蓝色茶壶",
            "小提琴",
            "地图",
            "望远镜",
            "石桥",
            "风筝",
            "钢笔",
            "月饼",
            "水车",
            "古钟",
        ]
        places = ["河边", "山脚下", "图书馆里", "车站旁", "厨房里", "屋顶上", "操场上", "邻居家", "集市上", "船上"]
        given = "明华强芳丽军伟娜静磊洋勇艳杰娟涛超霞平刚桂英兰鹏辉玲博文慧宇"

        def name() -> str:
            return rng.choice(people) + rng.choice(given) + rng.choice(given)

        return "".join(
            f"{name()}在{rng.choice(places)}{rng.choice(verbs)}{name()}的{rng.choice(things)}，"
            f"花了{rng.randint(2, 97)}天。"
            for _ in range(7)
        )
    names = words("Anna Boris Carla Dmitri Elif Farid Grace Hugo Ines Jonas Kofi Lena Mateo Nadia Omar Petra")
    verbs = words("repaired painted borrowed described lost measured sold photographed envied inherited")
    things = words("bicycle lantern violin telescope teapot atlas carpet ladder compass piano umbrella bridge kite")
    places = words("river station kitchen library harbour roof market garden museum forest tunnel ferry")
    return " ".join(
        f"{rng.choice(names)} {rng.choice(verbs)} the {rng.choice(things)} near the {rng.choice(places)} with "
        f"{rng.choice(names)} for {rng.randint(2, 97)} days."
        for _ in range(5)
    )


def near_copy(text: str, rng: random.Random) -> str:
    """The text as people repost it: other case, spacing or punctuation, a word changed, a sentence put before it."""
    chinese = not text.isascii()
    words = list(text) if chinese else text.split(" ")
    at = rng.randrange(len(words))
    glue = "" if chinese else " "
    return rng.choice(
        [
            text.upper() if not chinese else text.replace("，", "，\n"),
            glue.join([*words[:at], "某" if chinese else "certain", *words[at:]]),
            glue.join([*words[:at], *words[at + 1 :]]),
            ("转：" if chinese else "Repost: ") + text + ("！" if chinese else "!!"),
            text.replace("。", "！") if chinese else text.replace(".", " ;"),
        ]
    )
