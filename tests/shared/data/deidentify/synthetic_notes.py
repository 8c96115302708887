"""Made-up notes and messages whose identifiers are known, in English and Chinese; nothing in them is anybody's.

Two sets of templates: the rules were written with the first set in view (`seen`), and not changed for the second (`unseen`), whose
figures are the ones to believe. Both hold what rules cannot know: names without any sign, in small letters, dates without a year.
"""
# ruff: noqa: E501 - a note is one line

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from shared.data.deidentify.spans import Kind, Span


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Olu Margaret Siobhan Priyanka Declan Ravi Hannah Wojciech Leila Marcus Aoife Tomasz Grace Yusuf Ingrid Dwayne Beatriz Hiro Noor"
    " William Svetlana Jean-Luc Rosie Kwame Elif Tadeusz Mark Faith Chidi Lakshmi Robert Susan Ahmed Chloe Bartholomew"
)
_LAST = _words(
    "Okafor Thompson O'Sullivan Raman Murphy Patel Lindqvist Kowalski Haddad Brown McAllister Nowak Ferreira Demir Tanaka Baptiste"
    " Green Ivanova Nkrumah Fitzgerald Young Suarez Hughes-Price Banerjee Schmidt Park Achterberg Walker Price Zhou"
)
_SURNAMES_ZH = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段漕钱汤尹黎易常武乔贺赖龚文欧"
_GIVEN_ZH = _words(
    "伟 芳 秀英 敏 静 丽 强 磊 军 洋 艳 杰 娟 涛 明 超 秀兰 霞 平 建国 桂英 志强 雨桐 子轩 晓东 海燕 文博 佳怡 国庆 小红 春梅 永福 思远 若曦"
)
_MONTHS = _words("January February March April May June July August September October November December")

_TEMPLATES = {
    ("en", "seen"): (
        "Mr {NAME}, 58, attended clinic on {DATE} complaining of chest pain. MRN {ID}. BP 150/90, pulse 88. Started ramipril 2.5 mg.",
        "Patient {NAME} (DOB {DATE}) was admitted via ED with shortness of breath. Next of kin: {NAME}, tel {PHONE}.",
        "Seen by Dr {NAME} and staff nurse {NAME}. Wound clean, 3 x 4 cm. Review in 2 weeks. Bleep 4412 if febrile.",
        "Dear Dr {NAME},\n\nThank you for referring {NAME}, whom I saw on {DATE}. Her HbA1c is 7.9 %.\n\nYours sincerely,\n{NAME}\nConsultant Physician",
        "NHS number {ID}. A {AGE}-year-old woman living alone; daughter {NAME} visits daily. Allergic to penicillin.",
        "{NAME} was discharged on {DATE} with tramadol 50 mg. Follow-up with {NAME} in {MONTH}.",
        "Discussed results with {NAME} by telephone ({PHONE}). Creatinine 1.4, potassium 4.1, platelets 250,000.",
        "pt {NAME} reports no pain today; wants results sent to {EMAIL}. Weight 72.5 kg, height 1.68 m.",
        "Name: {NAME}\nDate of birth: {DATE}\nHospital number: {ID}\nAdmitted: {DATE}\nConsultant: {NAME}",
        "Spoke to the patient's husband, {NAME}. He will call back on {PHONE} after 5 pm. Score 4/5 on the pain scale.",
        "SSN {ID} verified. Insurance policy no. {ID}. Home address confirmed by {NAME} on {DATE}.",
        "Electronically signed by {NAME}, MD on {DATE} at 14:32.",
        "The patient, {NAME}, is a pleasant 45-year-old carpenter. Kowalska's sign negative. LDL 130 mg/dL.",
        "Hi, my name is {NAME} and my card {ACCOUNT} was charged twice on {DATE}. Please call {PHONE} or write to {EMAIL}.",
        "Please transfer 1,250.00 EUR from IBAN {ACCOUNT} to {NAME}; reference invoice 2217.",
        "I opened account number {ACCOUNT} with you in {DATE} and still cannot log in from {IP}. Screenshots: {URL}",
        "Customer {NAME} called from {PHONE} about a lost card ending in {TAIL}. Verified with passport no. {ID}.",
        "Good morning,\nI would like to close my savings account. My details are at {URL}.\nKind regards,\n{NAME}",
        "Could you tell {NAME} that the mortgage papers from {DATE} are ready? She left her number: {PHONE}.",
        "{NAME} said the exchange rate was wrong, see the receipt of {DATE}. Charged 3.99, expected 2.99.",
        "Bloods taken {DATE}: Hb 12.1, WCC 9.8, CRP 45. Chest X-ray clear. Plan: continue oral antibiotics for 7 days.",
        "The transaction was declined at 10:45 by the terminal with code 51. Nothing else was out of order.",
        "Ms. {NAME} was brought in by her neighbour {NAME}. GCS 15, temp 38.2, saturations 96 % on air.",
        "Case discussed at MDT. {NAME} to contact family. Stage T2N0M0, 12 of 14 nodes negative, Ki-67 20 %.",
        "i am {name} and i cannot see my transfer of 200 pounds, my email is {EMAIL}",
        "Father ({NAME}) died of MI aged {AGE}. Mother well. Smokes 20 a day, 15 pack years, BMI 31.4.",
    ),
    ("zh", "seen"): (
        "患者{NAME_ZH}，男，58岁，因“胸痛3天”于{DATE_ZH}入院。血压150/90mmHg，心率88次/分。",
        "姓名：{NAME_ZH}　性别：女　身份证号：{RESIDENT}　联系电话：{MOBILE}　住院号：{RECORD}",
        "主治医师：{NAME_ZH}。患者高血压病史10年，白细胞9.8×10^9/L，予阿司匹林100mg口服。",
        "{DATE_ZH}复查胸片未见异常，{NAME_ZH}医生建议继续口服抗生素7天，2周后门诊随诊。",
        "家属{NAME_ZH}签字同意手术，联系电话{MOBILE}。患者方便时可下床活动。",
        "您好，我叫{NAME_ZH}，我的银行卡{CARD}在{DATE_ZH}被重复扣款，请尽快处理，邮箱{EMAIL}。",
        "{NAME_ZH}女士来电反映信用卡尾号{TAIL}无法使用，登录地址{IP}，已转{NAME_ZH}经理处理。",
        "患者{NAME_ZH}诉头痛2天，{NAME_ZH}主任查房，指示完善头颅CT检查。既往史无特殊。",
        "收款人：{NAME_ZH}，账号：{CARD}，金额3,200.00元，备注：货款。",
        "今日{NAME_ZH}来院复诊，伤口愈合良好，予拆线。体温36.8℃，体重72.5kg。",
        "患者，女，{AGE}岁，由其女{NAME_ZH}陪同就诊，电话{MOBILE}，{DATE_ZH}曾于外院住院。",
        "查血常规示白细胞升高，C反应蛋白45mg/L，诊断为社区获得性肺炎，予头孢曲松2g静滴。",
        "产妇{NAME_ZH}于{DATE_ZH}顺产一女婴，重3200g，责任护士：{NAME_ZH}。",
        "客户{NAME_ZH}咨询贷款利率，客户经理{NAME_ZH}已回复，网页{URL}。方案可以再议。",
        "上周转账给{NAME_ZH}的5000元还没有到账，请问什么时候可以收到？",
    ),
    ("en", "unseen"): (
        "58M w/ hx of HTN. {NAME} came to the office {DATE}. Labs pending. Home phone is {PHONE}.",
        "OPERATIVE REPORT\nSURGEON: {NAME}, MD\nASSISTANT: {NAME}\nDATE OF PROCEDURE: {DATE}\nESTIMATED BLOOD LOSS: 150 mL",
        "I had the pleasure of meeting {NAME} at the Wednesday clinic. She takes metformin 500 mg twice daily.",
        "Transferred from the ward under the care of Prof {NAME}. EF 35 %, NYHA III, BNP 1,250.",
        "Social: lives with partner {NAME} and two children, {first} and {first}. Works as a teacher.",
        "Copy to: {NAME}, Health Centre. Unit number {ID}. Typed {DATE}.",
        "Message left for {NAME} re: biopsy. Callback {PHONE}. Ask for {first}.",
        "Overnight {first} was agitated; settled with lorazepam 1 mg. Family aware. Bed 14.",
        "Mrs {NAME} is {AGE} years old and was widowed in {MONTH}. MMSE 24/30, clock drawing normal.",
        "Handover from {NAME}: bed 3, K+ 5.9, repeat at 18:00; bed 7, for CT head. Bleep 2231.",
        "Hello, can you send my statement to {EMAIL}? The old address is no longer valid. {NAME}",
        "There is a direct debit from {DATE} that I do not recognise, 49.99 to a gym. Account {ACCOUNT}.",
        "The beneficiary is {NAME}, {ACCOUNT}, bank in Utrecht. Amount 800. Fees shared.",
        "{NAME} (joint holder) must also sign. Fax the form to {PHONE}, or upload it at {URL}.",
        "Why was my card swallowed by the machine on {DATE}? It is {ACCOUNT}. Regards {NAME}",
        "My husband {first} and I would like a joint account. He banks with you since 2009, customer number {ID}.",
        "Login attempt blocked from {IP} at 03:12 for user {EMAIL}.",
        "My top-up of 20 pounds failed three times, the app says try again later. What is going on?",
        "Impression: likely viral. Safety-netted. Return if fever above 39 for more than 5 days. Sats 98 %.",
        "my daughter {name} is 16, can she get her own card? call me on {PHONE}",
    ),
    ("zh", "unseen"): (
        "{NAME_ZH}，女，45岁，已婚，教师，{DATE_ZH}由门诊收入我科。查体：腹软，无压痛。",
        "今晨{NAME_ZH}主任医师查房后指出：患者目前病情平稳，可于{DATE_ZH}出院。",
        "手术者：{NAME_ZH}　助手：{NAME_ZH}　麻醉方式：全麻　出血量：150ml",
        "患儿{NAME_ZH}昨夜体温39.2℃，予布洛芬混悬液5ml口服后降至37.5℃。",
        "患者之子{NAME_ZH}（电话{MOBILE}）要求转院，值班医生{NAME_ZH}已告知风险。",
        "病历号{RECORD}，患者姓名{NAME_ZH}，住址略，病理号未出。诊断：胃窦腺癌T2N0M0。",
        "老人今年{AGE}岁，平时由保姆{NAME_ZH}照顾，近期记忆力下降，MMSE评分18分。",
        "我是{NAME_ZH}，手机号{MOBILE}，身份证{RESIDENT}，想查询{DATE_ZH}的一笔交易。",
        "请把余额转到{CARD}，户名{NAME_ZH}，开户行略。谢谢！",
        "贵行的{NAME_ZH}小姐服务很好，帮我在{DATE_ZH}办好了贷款，特此表扬。",
        "我老公{NAME_ZH}的卡被吞了，卡号是{CARD}，请联系{EMAIL}。",
        "系统提示IP {IP}异常登录，请登录{URL}修改密码，客服{NAME_ZH}为您服务。",
        "术后第3天，引流量约50ml，切口无红肿，白细胞7.8，继续抗感染治疗，方案同前。",
        "手续费太高了，转5万要收25元，能不能减免？高峰期排队太久。",
    ),
}

_KINDS: dict[Kind, str] = {
    "name": "NAME name first NAME_ZH",
    "date": "DATE DATE_ZH MONTH",
    "phone": "PHONE MOBILE",
    "email": "EMAIL",
    "url": "URL",
    "ip": "IP",
    "account": "ACCOUNT CARD TAIL",
    "id": "ID RESIDENT RECORD",
    "age": "AGE",
}
_KIND_OF: dict[str, Kind] = {slot: kind for kind, slots in _KINDS.items() for slot in slots.split()}


@dataclass(frozen=True)
class Note:
    """A text, and where its identifiers are."""

    text: str
    truth: tuple[Span, ...]


def notes(number: int, *, seed: int, language: str, templates: str) -> list[Note]:
    """Return notes from the templates of a language ("en" or "zh"), "seen" or "unseen", each in turn."""
    rng = random.Random(f"{seed}/{language}/{templates}")
    chosen = _TEMPLATES[language, templates]
    return [_filled(chosen[i % len(chosen)], rng) for i in range(number)]


def _filled(template: str, rng: random.Random) -> Note:
    text, truth = "", []
    for part in re.split(r"(\{\w+\})", template):
        slot = part.strip("{}")
        if part.startswith("{"):
            value = _MAKERS[slot](rng)
            truth.append(Span(len(text), len(text) + len(value), _KIND_OF[slot]))
            text += value
        else:
            text += part
    return Note(text, tuple(truth))


def _digits(rng: random.Random, number: int) -> str:
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(number - 1))


def _name(rng: random.Random) -> str:
    first, last = rng.choice(_FIRST), rng.choice(_LAST)
    forms = [f"{first} {last}", f"{first[0]}. {last}", f"{first} {rng.choice('ABCDEFG')}. {last}"]
    return rng.choices(forms, [6, 1, 1])[0]


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1931, 2025)
    name = _MONTHS[month - 1]
    numeric = [
        f"{year}-{month:02}-{day:02}",
        f"{day:02}/{month:02}/{year}",
        f"{month}/{day}/{year % 100:02}",
        f"{day}.{month}.{year}",
    ]
    words = [f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}-{name[:3]}-{year}", f"{name} {year}"]
    return rng.choice([*numeric, *words, f"{day}th {name}", f"{name[:3]} {day}", f"{day}/{month}"])


def _date_zh(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1940, 2025)
    full = [f"{year}年{month}月{day}日", f"{year}-{month:02}-{day:02}", f"{year}/{month}/{day}"]
    return rng.choice([*full, f"{month}月{day}日", f"{year}年{month}月", f"{month}月{day}号"])


def _phone(rng: random.Random) -> str:
    area, four = rng.randint(201, 989), _digits(rng, 4)
    american = [f"({area}) 555-{four}", f"{area}-555-{four}", f"+1 {area} 555 {four}", f"555-{four}"]
    return rng.choice(
        [*american, f"+44 20 7946 {four}", f"07700 900{four[:3]}", f"0131 496 {four}", f"+49 30 {_digits(rng, 8)}"]
    )


def _email(rng: random.Random) -> str:
    last = rng.choice(_LAST).lower().replace("'", "")
    host = rng.choice(["mail.example.com", "example.org", "nhs.example.uk"])
    return f"{rng.choice(_FIRST).lower()}.{last}{rng.choice(['', '84'])}@{host}"


def _url(rng: random.Random) -> str:
    return rng.choice(["https://", "http://", "www."]) + f"example.com/files/{_digits(rng, 5)}?id={_digits(rng, 3)}"


def _ip(rng: random.Random) -> str:
    four = ".".join(str(rng.randint(1, 254)) for _ in range(4))
    return rng.choice([four, f"2001:db8::{rng.randrange(4096):x}:{rng.randint(1, 9)}"])


def card(rng: random.Random, gap: str = " ") -> str:
    """Return a card number with its check digit."""
    body = "4" + "".join(str(rng.randint(0, 9)) for _ in range(14))
    total = sum(d if i % 2 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(int(c) for c in body))
    full = body + str(-total % 10)
    return gap.join(full[i : i + 4] for i in range(0, 16, 4))


def iban(rng: random.Random) -> str:
    """Return an IBAN with its check digits."""
    country, length = rng.choice([("DE", 18), ("NL", 14), ("GB", 18)])
    body = "".join(str(rng.randint(0, 9)) for _ in range(length))
    if country != "DE":
        body = "".join(rng.choice("ABNRWST") for _ in range(4)) + body[4:]
    check = 98 - int("".join(str(int(c, 36)) for c in body + country + "00")) % 97
    return f"{country}{check:02}{body}"


def _account(rng: random.Random) -> str:
    whole = iban(rng)
    spaced = " ".join(whole[i : i + 4] for i in range(0, len(whole), 4))
    return rng.choice([card(rng), card(rng, ""), whole, spaced, _digits(rng, 8)])


def nhs(rng: random.Random) -> str:
    """Return an NHS number with its check digit."""
    while True:
        body = "".join(str(rng.randint(0, 9)) for _ in range(9))
        check = (11 - sum(int(c) * w for c, w in zip(body, range(10, 1, -1), strict=True)) % 11) % 11
        if check != 10:
            return f"{body[:3]} {body[3:6]} {body[6:]}{check}"


def _id(rng: random.Random) -> str:
    ssn = f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{_digits(rng, 4)}"
    return rng.choice([_digits(rng, 7), f"{rng.choice('ABKX')}{_digits(rng, 6)}", nhs(rng), ssn])


def resident(rng: random.Random) -> str:
    """Return a resident identity number of China with its check digit."""
    born = f"{rng.randint(1940, 2010)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    body = f"{rng.choice([110105, 310101, 440103])}{born}{rng.randint(0, 999):03}"
    return body + "10X98765432"[sum(int(c) * 2 ** (17 - i) for i, c in enumerate(body)) % 11]


_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "NAME": _name,
    "name": lambda rng: _name(rng).lower(),
    "first": lambda rng: rng.choice(_FIRST),
    "NAME_ZH": lambda rng: rng.choice(_SURNAMES_ZH) + rng.choice(_GIVEN_ZH),
    "DATE": _date,
    "DATE_ZH": _date_zh,
    "MONTH": lambda rng: rng.choice(_MONTHS),
    "PHONE": _phone,
    "MOBILE": lambda rng: f"1{rng.choice('3456789')}{_digits(rng, 9)}",
    "EMAIL": _email,
    "URL": _url,
    "IP": _ip,
    "ACCOUNT": _account,
    "CARD": lambda rng: card(rng, ""),
    "TAIL": lambda rng: _digits(rng, 4),
    "ID": _id,
    "RESIDENT": resident,
    "RECORD": lambda rng: _digits(rng, rng.choice([6, 8, 10])),
    "AGE": lambda rng: str(rng.randint(90, 104)),
}
