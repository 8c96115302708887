"""Names of people in Chinese text: a common surname and one or two characters, where a word beside it speaks of a person.

Surnames: a hundred common ones, and compound ones. Without such a word a surname is an ordinary character (高 in 高血压,
白 in 白细胞), so nothing is masked there. A name that was found once is masked wherever else it stands in the same record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from shared.data.deidentify.spans import Span

SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘蒋蔡余于杜叶程苏魏吕丁任沈姚卢姜崔钟谭陆汪范金石廖贾夏韦付方白邹孟熊秦邱江尹薛闫段雷侯"
    "龙史陶黎贺顾毛郝龚邵万钱严覃武戴莫孔向汤"
)
COMPOUND = (
    "欧阳|司马|上官|诸葛|东方|皇甫|尉迟|公孙|慕容|司徒|夏侯|端木|令狐|宇文|长孙|南宫|西门|独孤|轩辕|申屠"
    "|闻人|太史|澹台|公冶|淳于|单于|赫连|钟离"
)
_COMPOUND = re.compile(COMPOUND)
_HAN = "\u4e00-\u9fff"
_ANY_HAN = re.compile(f"[{_HAN}]")
_SURNAME = rf"(?:{COMPOUND}|[{SURNAMES}])"

# What may follow a name directly. A third character that is one of these belongs to the sentence, not to the name.
_AFTER = (
    "因于在是的来到诉称说自已曾将被把向与和及或等就由为以从对有无未不可需要前"
    "后上下今昨明即再又也都还仍现系经行做去拟主入出住接报反表觉感突无持伴男女"
)
_BOUNDARY = re.compile(rf"(?=[^{_HAN}]|$|[{_AFTER}])")
_LINK = r"[ \t\u3000]{0,3}(?:是|为|叫)?[ \t\u3000]{0,2}[:：]?[ \t\u3000]{0,4}"

# Words after which a name is nearly certain, and words after which most of what follows is not a name.
_STRONG_CUE = (
    "姓名|名字叫?|名叫|我叫|叫做|联系人|收款人|付款人|收件人|寄件人|申请人|投保人|被保险人|受益人|委托人|持卡人|户主|户名|开户人|签名|签字|签署人|记录者|记录人|报告者|报告人|审核者|审核人|检查者"
    "|主诊医师|主治医师|主任医师|住院医师|经治医师|责任护士|主刀|术者|助手|麻醉师|经办人|客户经理|陈述者|监护人|紧急联系人"
)
_WEAK_CUE = (
    "患者|病人|病员|患儿|产妇|伤者|死者|家属|客户|储户|顾客|用户|医生|医师|大夫|护士|主任|教授|院长|经理|老师|律师|同事|朋友|邻居|母亲|父亲|妻子|丈夫|儿子|女儿|哥哥|姐姐|弟弟|妹妹|其母|其父|其妻|其夫|其子|其女"
    "|先生|女士"
)
_TITLE = (
    "先生|女士|小姐|太太|夫人|医生|大夫|主任|护士长|护士|医师|护师|药师|教授|院长|科长|处长|局长|总监"
    "|经理|老师|老板|同志|阿姨|叔叔|大爷|大妈|师傅|律师|警官"
)

# Characters that given names are made of most often; after a weak word they tell a name from a finding.
_IN_NAMES = set(
    "伟芳娜秀英敏静丽强磊军洋艳勇杰娟涛明超兰霞平刚桂文辉鹏飞鑫波斌宇浩凯健俊帆雪琴玲红梅春燕海晓晨阳佳欣怡婷婷雯倩莹慧颖琳璐瑶梦洁雅馨子轩梓涵雨桐泽浩然一诺思远若曦嘉欣宁安宏建国志"
    "永福庆华东林森峰岩山川江河龙虎彪武威毅坚诚信义仁德礼智贤良善美凤珍珠玉宝金银荣贵富昌盛兴旺生根发财祥瑞吉利顺和光辉亮灿星月云霜露霖天地乾坤元亨贞立新民族爱党卫成功学书画诗琪琦瑜瑾萱萍菊莲荷莉"
    "蓉薇蕾蓓芝芬芸苗茜茹菲菁彤丹青紫翠碧香馥媛妍妮姣娇婉嫣姗巧巍博超越启航恒旭晖昊昕晶晗曼朗朝振翔翰耀胜达进展权鹤鸿淑惠贞素清淳源润泉洪涵滨澜炜煜炎焕烨焱铭钧钢锋锐钰锦"
)
_GIVEN = rf"[{_HAN}]{{1,2}}"
_STRONG = re.compile(rf"(?:{_STRONG_CUE}){_LINK}(?P<name>{_SURNAME}(?:{_GIVEN}))")
# Behind a label whatever stands alone is a name, also with a rare surname.
_LABELLED = re.compile(
    rf"(?:(?:{_STRONG_CUE})[ \t\u3000]{{0,2}}[:：][ \t\u3000]{{0,4}}|我叫|名叫)(?P<name>[{_HAN}]{{2,4}})(?![{_HAN}])"
)
_WEAK = re.compile(rf"(?:{_WEAK_CUE})(?P<link>[ \t\u3000]?[:：]?[ \t\u3000]{{0,2}})(?P<name>{_SURNAME}{_GIVEN})")
_TITLED = re.compile(rf"(?=(?P<name>{_SURNAME}[{_HAN}]{{0,2}}?)(?:{_TITLE}))")
_DOTTED = re.compile(
    rf"(?<![{_HAN}])[{_HAN}]{{1,6}}(?:[·•‧][{_HAN}]{{1,8}}){{1,3}}|[{_HAN}]{{2,4}}(?:[·•‧][{_HAN}]{{2,5}}){{1,3}}"
)

# Beginnings of ordinary words: after "patient" these are findings, not people.
_WORDS = (
    "高血|高热|高烧|高龄|高度|高危|高脂|高糖|高处|高敏|高级|高等|高中|高兴|高大|高分|高端|高手|高层|高速|白细|白蛋|白内|白带|白天|白班|白衣|白色|白领|黄疸|黄染|黄色|金属|金额|金融|金牌|石膏|石化"
    "|方便|方可|方法|方案|方面|方才|何时|何处|何种|何况|任何|任意|任务|任职|任教|严重|严格|严密|向来|向我|向您|向其|于是|于今|万一|万能|万分|马上|马虎|常规|常常|余无|余未|余额|余下|程度|程序|龙头|江湖"
    "|江苏|江西|水肿|史无|史地|史学|武汉|武术|金钱|钱包|钱款|孔雀|顾客|顾虑|顾问|段落|雷同|雷达|方式|毛发|毛病|毛巾|汤药|许多|许可|许久|曾经|曾有|曾在|曾因|曾于|曾患|曾行|沈阳|田径|田地|温度|贺卡|莫名|莫非"
    "|付款|付费|付现|付出|付完|谢班|任课|任教|班主|丁香|肖像|夏天|夏季|秦岭|熊猫|陆续|陆地|汪洋|戴着|戴眼|戴有|孙女|孙子|外孙|叶子|胡子|胡乱|胡说|林业|唐氏|唐朝|宋体|宋朝|梁山|罗列|谢谢|何必|何以|贾宝|范围|范例|钟头|钟表|石头|苏醒|苏州"
    "|郑重|郑州|万元|万人|周围|周期|周末|周身|周内|周前|周后|周一|周二|周三|周四|周五|周六|周日|陈旧|陈述|杨梅|徐州|徐徐|马桶|马路|朱红|吴语|王牌|李子|张口|张开|张力|刘海|崔促|姜汁|魏晋|侯诊|邓论|彭湃|曹操"
)
_ORDINARY = re.compile(rf"(?:{_WORDS})")
# Characters that make, with a surname behind them, a word: 主任, 对方, 检查史.
_BEFORE_SURNAME = {
    "任": "主责担信离前现历胜",
    "方": "对双地官甲乙平处配各多前后东西南北医院校资我贵己警军敌店卖买商厂",
    "金": "资现奖基押租黄本",
    "史": "历病个家婚月既往食药",
    "石": "结胆肾宝",
    "程": "携过工课流全进疗病日历",
    "高": "升提增最偏很较更",
    "白": "蛋明表苍空坦",
    "万": "千百十几数",
    "段": "阶手时片路",
    "余": "其多剩业",
    "于": "由对关属至位等处善终急基鉴",
    "谢": "谢感多致答",
    "付": "支预垫到交",
    "夏": "华",
    "江": "长浙黑",
    "王": "大霸国帝女天",
    "龙": "恐沙水",
    "武": "",
    "马": "人车木",
}
_NOBODY = re.compile("不详|未知|本人|同上|保密|匿名|无名氏?|患者|家属")
_GIVEN_NO = set(
    "的了是在有和与及或也都就还被把让给向对从到由为因以我你他她它们这那哪谁什么怎吗呢吧啊哦呀着过得地不没很太更最请说叫问找见姓大"
)


def find_chinese_names(text: str) -> Iterator[Span]:
    """Yield names, and later mentions of the full ones in the same text."""
    if not _ANY_HAN.search(text):
        return
    found = set(_by_cue(text))
    yield from found
    for name in sorted({text[span.start : span.end] for span in found if span.end - span.start >= 2}):
        for match in re.finditer(re.escape(name), text):
            yield Span(match.start(), match.end(), "name")


def _by_cue(text: str) -> Iterator[Span]:
    for match in _STRONG.finditer(text):
        yield from _fitted(text, match.start("name"), match.end("name"), certain=True)
    for match in _WEAK.finditer(text):
        yield from _fitted(
            text, match.start("name"), match.end("name"), certain=bool(match.group("link").strip(" \t\u3000"))
        )
    for match in _LABELLED.finditer(text):
        if not _NOBODY.fullmatch(match.group("name")):
            yield Span(match.start("name"), match.end("name"), "name")
    yield from _before_titles(text)
    for match in _DOTTED.finditer(text):
        yield Span(match.start(), match.end(), "name")


def _fitted(text: str, start: int, end: int, *, certain: bool) -> Iterator[Span]:
    """Yield the name at `start`, as long as it fits: what follows must be able to follow a name, unless that is certain."""
    if _ORDINARY.match(text, start):
        return
    surname = 2 if _COMPOUND.match(text, start) else 1
    given = end - start - surname
    lengths = [length for length in (2, 1) if length <= given]
    if given == 2 and text[start + surname + 1] in _AFTER:
        lengths.reverse()  # 王芳于...: two characters and a preposition
    if not certain and given == 2 and set(text[start + surname : end]) <= _IN_NAMES:
        yield Span(start, end, "name")
        return
    for length in lengths:
        last = start + surname + length
        if set(text[start + surname : last]) & _GIVEN_NO:
            continue
        if _BOUNDARY.match(text, last) or (not certain and set(text[start + surname : last]) <= _IN_NAMES):
            yield Span(start, last, "name")
            return
    if certain and not set(text[start + surname : end]) & _GIVEN_NO:
        yield Span(start, end, "name")


def _before_titles(text: str) -> Iterator[Span]:
    """Yield the longest name that ends where a title begins, such as 张伟 of 张伟医生, or 李 of 李主任."""
    best: dict[int, int] = {}
    for match in _TITLED.finditer(text):
        start, end = match.start("name"), match.end("name")
        name = match.group("name")
        before = text[start - 1] if start else ""
        if before and before in _BEFORE_SURNAME.get(name[0], ""):
            continue
        # 向 before a title is nearly always the preposition: 向前台小姐.
        if name[0] == "向" or _ORDINARY.match(name) or set(name[1:]) & _GIVEN_NO:
            continue
        best.setdefault(end, start)
    for end, start in best.items():
        # 由于王主任: a preposition that is a surname too, with the surname behind it.
        while end - start > 1 and text[start] in "于向任何曾" and text[start + 1] in SURNAMES:
            start += 1
        yield Span(start, end, "name")
